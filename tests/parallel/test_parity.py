"""Sharded transformers against the single one, over chunks of a stream, on gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch

from tests.parallel.file_peers import FilePeers
from wanrt.models.fp8 import apply_fp8, dequantised_product
from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
from wanrt.models.transformer import TransformerConfig, WanTransformer
from wanrt.parallel.apply import apply
from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import Topology

SMALL = TransformerConfig(
    dim=96, ffn_dim=192, num_layers=3, num_heads=8, text_dim=24, text_len=16, freq_dim=32
)
GRID = (4, 6)
STEPS = (1000.0, 750.0, 500.0)
TOLERANCE = 1e-4  # of the output's scale, fp32


def build(config, seed=0):
    torch.manual_seed(seed)
    model = WanTransformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm_q.weight", "norm_k.weight")):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def stream(model, config, policy, grid, chunks, heads=None, window=3, empty=None):
    """Latents of every chunk, of a loop like the pipeline's: context or commit passes, a prompt change, a bias."""
    sink = int(policy is CachePolicy.SINK)
    cache = KVCache.allocate(
        config, policy=policy, frames=window, grid=grid, heads=heads, sink=sink, empty=empty
    )
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    size = (grid[0] * 2, grid[1] * 2)
    prompts = [model.embed_text(draw(1, length, config.text_dim)) for length in (9, config.text_len)]
    made = []
    for chunk in range(chunks):
        text = prompts[chunk * 2 // chunks]
        if policy is CachePolicy.RECOMPUTE and made:
            context = torch.cat(made, dim=2)[:, :, -window:]
            model(context, torch.zeros(1, context.shape[2]), text, cache, pass_=Pass.CONTEXT)
        bias = torch.tensor(math.log(0.3)) if chunk % 2 else None
        x = draw(1, 16, 3, *size)
        for step in STEPS:
            times = torch.full((1, 3), step)
            velocity = model(x, times, text, cache, pass_=Pass.DENOISE, bias=bias)
            clean = x - step / 1000 * velocity
            x = clean * 0.6 + 0.4 * draw(1, 16, 3, *size)
        made.append(clean)
        if policy is not CachePolicy.RECOMPUTE:
            model(clean, torch.zeros(1, 3), text, cache, pass_=Pass.COMMIT)
    return torch.cat(made, dim=2)


def sharded(group, topology, config, policies, grid, chunks):
    plan = ShardPlan.of(Topology.parse(topology))
    with torch.inference_mode():
        model = apply(build(config), plan, group)
        heads = plan.local_heads(config.num_heads)
        return [stream(model, config, policy, grid, chunks, heads).numpy() for policy in policies]


def both(group, size, *arguments):
    return [sharded(group, f"{kind}={size}", *arguments) for kind in ("tp", "ulysses")]


def errors(results, config, policies, grid, chunks):
    """Largest error of every rank, kind and policy, of the single model's scale."""
    model = build(config)
    with torch.inference_mode():
        want = [stream(model, config, policy, grid, chunks) for policy in policies]
    return [
        (torch.from_numpy(made) - wanted).abs().max().item() / wanted.abs().max().item()
        for rank in results
        for kind in rank
        for made, wanted in zip(kind, want, strict=True)
    ]


def test_two_ranks_make_what_one_makes(on_ranks):
    arguments = (SMALL, tuple(CachePolicy), GRID, 5)
    found = errors(on_ranks(2, both, 2, *arguments), *arguments)
    print(f"2 ranks: {max(found):.1e}")
    assert len(found) == 2 * 2 * 3
    assert max(found) <= TOLERANCE


@pytest.mark.slow
def test_four_ranks_make_what_one_makes(on_ranks):
    arguments = (SMALL, tuple(CachePolicy), GRID, 5)
    found = errors(on_ranks(4, both, 4, *arguments), *arguments)
    print(f"4 ranks: {max(found):.1e}")
    assert max(found) <= TOLERANCE


def through_memory(group, folder, topology, config, policies, grid, chunks):
    """As `sharded`, where the ranks store in each other's memory."""
    plan, peers = ShardPlan.of(Topology.parse(topology)), FilePeers(group, folder)
    with torch.inference_mode():
        model = apply(build(config), plan, group, peers)
        heads = plan.local_heads(config.num_heads)
        return [
            stream(model, config, policy, grid, chunks, heads, empty=peers.empty).numpy()
            for policy in policies
        ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
@pytest.mark.parametrize(
    ("ranks", "policies"),
    # interpreted kernels take half a minute a policy; four ranks differ from two in their number alone
    [(2, tuple(CachePolicy)), pytest.param(4, (CachePolicy.RECOMPUTE,), marks=pytest.mark.slow)],
)
def test_ranks_that_share_memory_make_what_one_makes(on_ranks, tmp_path, ranks, policies):
    pytest.importorskip("triton", reason="Triton is not installed")
    arguments = (SMALL, policies, (2, 4), 3)  # the third chunk finds a full window of context, and rolls it
    made = on_ranks(ranks, through_memory, str(tmp_path), f"ulysses={ranks}", *arguments)
    found = errors([[rank] for rank in made], *arguments)
    print(f"{ranks} ranks, shared memory: {max(found):.1e}")
    assert max(found) <= TOLERANCE


FP8_SIZE = TransformerConfig(
    dim=128, ffn_dim=192, num_layers=2, num_heads=4, text_dim=24, text_len=16, freq_dim=32
)


def quantised(group, size):
    """One pass of both kinds of mesh with fp8 products, and how many there are."""
    made = []
    for kind in ("tp", "ulysses"):
        plan = ShardPlan.of(Topology.parse(f"{kind}={size}"))
        with torch.inference_mode():
            inner = build(FP8_SIZE)
            model = apply(inner, plan, group)
            assert apply_fp8(inner, product=dequantised_product) == 2 * 8
            heads = plan.local_heads(FP8_SIZE.num_heads)
            made.append(stream(model, FP8_SIZE, CachePolicy.RECOMPUTE, GRID, 1, heads).numpy())
    return made


def test_fp8_ranks_make_what_one_makes(on_ranks):
    """Ulysses shares tokens, so every row is quantised as in one process: equal but for numbers beside a tie. Under
    tensor parallelism a rank scales its own part of attention's output and of the hidden numbers: as near to fp32.
    """
    plain, alone = build(FP8_SIZE), build(FP8_SIZE)
    apply_fp8(alone, product=dequantised_product)
    with torch.inference_mode():
        exact, want = (stream(m, FP8_SIZE, CachePolicy.RECOMPUTE, GRID, 1) for m in (plain, alone))
    off = ((want - exact).norm() / exact.norm()).item()
    assert 1e-3 < off < 0.1
    for tensor_parallel, ulysses in on_ranks(2, quantised, 2):
        found = [torch.from_numpy(made) for made in (tensor_parallel, ulysses)]
        split, shared = (
            (made - other).norm() / exact.norm() for made, other in zip(found, (exact, want), strict=True)
        )
        print(f"one {off:.1e}, tp=2 {split:.1e} from fp32; ulysses=2 {shared:.1e} from one")
        assert split < 1.3 * off
        assert shared < 0.1 * off


KREA_SLICE = TransformerConfig(dim=5120, ffn_dim=13824, num_layers=2, num_heads=40, text_dim=64, text_len=32)


@pytest.mark.slow
def test_two_layers_of_the_14b_shape(on_ranks):
    """Needs 8 GB: two ranks build the 2.9 GB of the slice and keep their parts."""
    arguments = (KREA_SLICE, (CachePolicy.RECOMPUTE,), (2, 2), 4)
    found = errors(on_ranks(2, both, 2, *arguments), *arguments)
    print(f"14B slice, tp=2 and ulysses=2 of each rank: {found}")
    assert len(found) == 2 * 2
    assert max(found) <= TOLERANCE
