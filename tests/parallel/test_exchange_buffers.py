"""What is estimated of the ranks' shared buffers against what a rank takes; its kernels are left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.parallel.test_parity import FP8_SIZE, SMALL, build
from wanrt.models.fp8 import apply_fp8, dequantised_product, plan_for
from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
from wanrt.parallel import fused_exchange, ulysses
from wanrt.parallel.apply import apply
from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import MeshKind, Topology
from wanrt.parallel.workload import Workload, exchange_buffers, memory

GRID = (4, 6)


class FirstOf:
    """The first rank of a group, without the others."""

    def __init__(self, size):
        self._size = size

    def rank(self):
        return 0

    def size(self):
        return self._size


class FirstPeer:
    """`Peers` of the first rank, without the others; counts the bytes that are taken."""

    def __init__(self, size):
        self.rank, self.size, self.bytes = 0, size, 0

    def empty(self, shape, dtype):
        self.bytes += math.prod(shape) * dtype.itemsize
        return torch.zeros(tuple(shape), dtype=dtype)

    def addresses(self, tensor):
        return torch.full((self.size,), tensor.data_ptr())

    def barrier(self):
        pass


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    for name in ("shared_add_norm", "shared_add_norm_rows"):
        monkeypatch.setattr(fused_exchange, name, lambda x, *arguments, **options: x)
    monkeypatch.setattr(fused_exchange, "store_mean_squares", lambda *arguments, **options: None)
    for name in ("scatter_heads", "scatter_tokens"):
        monkeypatch.setattr(ulysses, name, lambda *arguments, **options: None)


def workload(config, dtype, *, recompute, fp8):
    return Workload(
        dim=config.dim, ffn_dim=config.ffn_dim, layers=config.num_layers, heads=config.num_heads,
        text_dim=config.text_dim, text_len=config.text_len, freq_dim=config.freq_dim,
        width=16 * GRID[1], height=16 * GRID[0], window=3, steps=1, recompute=recompute, element=dtype.itemsize,
        vae_dim=96, text_encoder=0, fp8=fp8,
    )  # fmt: skip


def taken(config, topology, dtype, policy, *, fp8):
    """Bytes that a rank takes for the passes of a steady chunk, its cache not counted."""
    group, peers = FirstOf(topology.mesh), FirstPeer(topology.mesh)
    plan = ShardPlan.of(topology)
    whole = build(config).to(dtype)
    model = apply(whole, plan, group, peers)
    if fp8:
        apply_fp8(whole, plan_for(config.num_layers), product=dequantised_product)
    cache = KVCache.allocate(
        config, policy=policy, frames=3, grid=GRID, heads=plan.local_heads(config.num_heads),
        dtype=dtype, empty=peers.empty,
    )  # fmt: skip
    text = model.embed_text(torch.randn(1, 4, config.text_dim))
    before = peers.bytes  # the mean squares of a prompt took a small buffer, which the first pass outgrows
    latents = torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1])
    if topology.kind is MeshKind.ULYSSES:
        latents = model.share.cut(latents)
    first = Pass.CONTEXT if policy is CachePolicy.RECOMPUTE else Pass.COMMIT
    for pass_ in (first, Pass.DENOISE):
        step = cache.begin(pass_, 3)
        whole.run(latents, model.embed_time(torch.zeros(1, 3)), text, cache, step)
        cache.finish(step)
    return peers.bytes - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("policy", [CachePolicy.RECOMPUTE, CachePolicy.ROLLING])
@pytest.mark.parametrize("topology", ["tp=2", "tp=4", "ulysses=2", "ulysses=4"])
@torch.inference_mode()
def test_buffers_are_as_large_as_taken(topology, policy, dtype):
    work = workload(SMALL, dtype, recompute=policy is CachePolicy.RECOMPUTE, fp8=False)
    there = Topology.parse(topology)
    assert exchange_buffers(work, there) == taken(SMALL, there, dtype, policy, fp8=False)


@torch.inference_mode()
def test_fp8_takes_rows_too():
    there = Topology.parse("tp=2")
    config = replace(FP8_SIZE, num_layers=3)
    work = workload(config, torch.bfloat16, recompute=True, fp8=True)
    got = taken(config, there, torch.bfloat16, CachePolicy.RECOMPUTE, fp8=True)
    assert exchange_buffers(work, there) == got


def test_one_device_shares_nothing():
    work = workload(SMALL, torch.bfloat16, recompute=True, fp8=False)
    assert exchange_buffers(work, Topology()) == 0


@pytest.mark.parametrize("fp8", [False, True])
def test_buffers_count_as_room_of_the_passes(fp8):
    work = workload(SMALL, torch.bfloat16, recompute=True, fp8=fp8)
    tokens, two = 3 * GRID[0] * GRID[1], Topology.parse("tp=2")
    alone, shared = (memory(work, topology)[0].work for topology in (Topology(), two))
    halved = 2 * tokens * SMALL.ffn_dim * 2 // 2  # hidden values of the feed-forward
    assert shared - alone + halved == exchange_buffers(work, two)
