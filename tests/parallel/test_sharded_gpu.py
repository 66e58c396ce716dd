"""Both kinds of mesh over two GPUs under CUDA graphs, with and without collectives: parity, repeatability, speed."""

from __future__ import annotations

import multiprocessing
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.parallel.conftest import collect
from tests.parallel.test_parity import KREA_SLICE, build
from wanrt.models.fp8 import apply_fp8
from wanrt.models.kv_cache import CachePolicy, KVCache
from wanrt.parallel.apply import apply
from wanrt.parallel.peers import open_peers
from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import Topology
from wanrt.pipeline.denoiser import TransformerDenoiser
from wanrt.pipeline.graphs import GraphedDenoiser
from wanrt.pipeline.models import join_products

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]
CONFIG = KREA_SLICE  # two layers of the 14B shape
GRID = (24, 30)  # 720 tokens a latent frame, 2160 a chunk
WINDOW, TIMED, LIMIT_S = 3, 20, 60
KINDS = ("tp", "ulysses")
# No rank is forgiven more than the single model's own rounding; in fp8 a rank scales its own part of an input.
PRECISIONS = {"bf16": 1.1, "fp8": 1.3}
EXCHANGES = ("nccl", "peers")


@dataclass(frozen=True)
class Measured:
    """Latents of both runs of a stream, and milliseconds of a denoising pass."""

    first: np.ndarray
    again: np.ndarray
    denoise_ms: float


def quiet(done, count):
    pass


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def drawn(device):
    """The model with its weights, drawn on the device: on a CPU it takes longer than all that is tested."""
    with torch.device(device):
        return build(CONFIG)


def prepared(model, dtype, quantise):
    """A built model as the pipeline would run it on this GPU."""
    model = model.to(dtype).cuda()
    if quantise:
        assert apply_fp8(model) == 2 * 8
    if dtype is torch.bfloat16:
        join_products(model)
    return model


def denoiser(model, heads, graphs, empty):
    device = torch.device("cuda", torch.cuda.current_device())
    cache = KVCache.allocate(
        CONFIG,
        policy=CachePolicy.RECOMPUTE,
        frames=WINDOW,
        grid=GRID,
        heads=heads,
        device=device,
        dtype=model.dtype,
        empty=empty,
    )
    made = (GraphedDenoiser if graphs else TransformerDenoiser)(model, cache, device)
    if graphs:
        made.capture((1, 16, 3, 2 * GRID[0], 2 * GRID[1]), (False, True), quiet)
    return made, cache


def stream(model, cache):
    """Two chunks of three and two steps, a context pass between them, another prompt and a bias with the second."""
    cache.reset()
    size = (1, 16, 3, 2 * GRID[0], 2 * GRID[1])
    latents = []
    for chunk, steps in enumerate(((1000.0, 750.0, 500.0), (1000.0, 500.0))):
        model.set_text(draw(1, 9 + chunk, CONFIG.text_dim, seed=chunk))
        model.set_bias(0.3 if chunk else 1.0)
        if latents:
            model.context(latents[-1])
        x = draw(*size, seed=10 + chunk)
        for step in steps:
            clean = x - step / 1000 * model.denoise(x, step)
            x = clean * 0.6 + 0.4 * draw(*size, seed=round(step))
        latents.append(clean.clone())
    return torch.cat(latents, dim=2).float().cpu().numpy(), x


def measured(model, heads, graphs=True, empty=None):
    made, cache = denoiser(model, heads, graphs, empty)
    with torch.inference_mode():
        first, x = stream(made, cache)
        again, _ = stream(made, cache)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(TIMED):
            made.denoise(x, 500.0)
        end.record()
        end.synchronize()
    made.close()  # NCCL waits for its graphs
    return Measured(first, again, start.elapsed_time(end) / TIMED)


def rank_main(rank, size, store, results):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=size, device_id=device,
        timeout=timedelta(seconds=LIMIT_S),
    )  # fmt: skip
    group = dist.group.WORLD
    peers = open_peers(group, device)
    assert peers is not None, "these GPUs do not reach each other; the log says why"
    made, whole = {}, drawn(device)
    for kind, precision, exchange in product(KINDS, PRECISIONS, EXCHANGES):
        plan = ShardPlan.of(Topology.parse(f"{kind}={size}"))
        shared = peers if exchange == "peers" else None
        callee = apply(inner := deepcopy(whole), plan, group, shared)
        prepared(inner, torch.bfloat16, precision == "fp8")
        empty = peers.empty if shared and kind == "ulysses" else None
        made[kind, precision, exchange] = measured(callee, plan.local_heads(CONFIG.num_heads), empty=empty)
        del inner, callee
        torch.cuda.empty_cache()
    results.put((rank, made))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks measured, by precision and exchange."""
    context, store = multiprocessing.get_context("spawn"), tmp_path_factory.mktemp("tensor") / "store"
    results = context.Queue()
    processes = [
        context.Process(target=rank_main, args=(rank, 2, str(store), results), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(collect(results, processes))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return found


@pytest.fixture(scope="module")
def single():
    """Errors of the single model on one GPU against itself in fp32, by precision; and the latter's latents."""
    whole = drawn("cuda")
    exact = measured(prepared(deepcopy(whole), torch.float32, False), None, graphs=False).first
    alone = {
        precision: measured(prepared(deepcopy(whole), torch.bfloat16, precision == "fp8"), None)
        for precision in PRECISIONS
    }
    for precision, made in alone.items():
        print(f"{precision}, one GPU: {made.denoise_ms:.2f} ms, {error(made.first, exact):.1e} from fp32")
    return exact, {precision: error(made.first, exact) for precision, made in alone.items()}


def error(made, exact):
    return float(np.linalg.norm(made - exact) / np.linalg.norm(exact))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_make_what_one_makes(ranks, single, kind, precision):
    exact, own = single
    for rank, made in ranks.items():
        for exchange in EXCHANGES:
            result = made[kind, precision, exchange]
            off, ms = error(result.first, exact), result.denoise_ms
            print(f"{precision}, {kind}=2 by {exchange}, rank {rank}: {ms:.2f} ms, {off:.1e} from fp32")
            if exchange == "peers":
                assert off <= PRECISIONS[precision] * own[precision]
                assert precision == "fp8" or off <= 2e-2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_again_has_the_same_bits_on_all_ranks(ranks, kind, precision):
    made = [rank[kind, precision, "peers"] for rank in ranks.values()]
    for result in made:
        assert np.array_equal(result.first, result.again)
    assert np.array_equal(made[0].first, made[1].first)
