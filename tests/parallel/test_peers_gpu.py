"""Memory that two GPUs share: what one stores, the other sees behind a barrier, in graphs too."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist

from wanrt.parallel.peers import CudaPeers, open_peers
from wanrt_kernels.peer_heads import OwnTokens, scatter_tokens

pytestmark = pytest.mark.multigpu
ROUNDS, TOKENS, HEADS, HEAD_DIM = 400, 512, 8, 128


def rounds(peers, device):
    """Each round every rank stores its own number in all tokens of its heads: how many were wrong, of how many."""
    mine = peers.empty((TOKENS, 2 * HEADS, HEAD_DIM), torch.float32)
    share = OwnTokens(peers.rank, 2, 1, TOKENS)
    step = torch.zeros((), device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    delay = torch.ones(1024, 1024, device=device)
    ranks = torch.arange(1, 3, device=device).repeat_interleave(HEADS)[:, None]

    def one():
        step.add_(1)
        x = step.mul(peers.rank + 1).expand(2 * TOKENS, HEADS, HEAD_DIM).contiguous()
        if peers.rank:
            torch.mm(delay, delay)
        scatter_tokens(x, peers.addresses(mine), share)
        peers.barrier()
        wrong.add_((mine != step * ranks).sum())
        peers.barrier()

    one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            one()
    for _ in range(ROUNDS // 4):
        graph.replay()
    torch.cuda.synchronize()
    return wrong.item(), step.item()


def joined(rank, store, device):
    init = {"init_method": f"file://{store}", "rank": rank, "world_size": 2, "device_id": device}
    dist.init_process_group("nccl", **init)
    peers = open_peers(dist.group.WORLD, device)
    assert isinstance(peers, CudaPeers)
    return peers


def rank_main(rank, store, results):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    joined(rank, f"{store}-left", device)
    dist.destroy_process_group()  # a second group in the same process: nothing of the first may be remembered
    peers = joined(rank, store, device)
    found = rounds(peers, device)
    dist.barrier()
    if rank == 0:  # a barrier to which the other never comes
        peers.barrier()
        time.sleep(1)
        assert not torch.cuda.current_stream().query()
        peers.close()
        started = time.monotonic()
        torch.cuda.synchronize()
        found = (*found, time.monotonic() - started)
    results.put((rank, found))
    dist.destroy_process_group()


def test_stores_are_seen_and_a_missing_rank_is_not_waited_for(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, str(tmp_path / "store"), results)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=200) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert found[0][:2] == found[1] == (0, ROUNDS + 1)
    assert found[0][2] < 5
