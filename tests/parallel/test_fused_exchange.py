"""Tensor parallelism without collectives against the single model: gloo ranks that map each other's memory."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from tests.parallel.file_peers import FilePeers
from tests.parallel.test_parity import FP8_SIZE, SMALL, TOLERANCE, build, errors, stream
from wanrt.models.fp8 import apply_fp8, dequantised_product
from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
from wanrt.parallel.apply import apply
from wanrt.parallel.peers import SharedBuffers
from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import Topology
from wanrt_kernels.quant_rows import FP8, Rows

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted; see test_tensor_gpu"
)

GRID = (2, 4)
CHUNKS = 3  # the third finds a full window of context, and rolls it


class Counting(FilePeers):
    """`FilePeers` that counts the calls of `barrier` by their caller."""

    def __init__(self, group, folder):
        self.waits = 0
        super().__init__(group, folder)

    def barrier(self):
        self.waits += 1
        super().barrier()


class Late(FilePeers):
    """`FilePeers` of which the last rank dawdles after every wait, while the others run as far as they may."""

    def barrier(self):
        super().barrier()
        if self.rank == self.size - 1:
            time.sleep(0.03)  # the others come to their next store in a third of it


def fused(group, config, folder, peers=FilePeers):
    """A model whose collectives must not be called: it has nobody to call them with."""
    model = apply(
        build(config), ShardPlan.of(Topology.parse(f"tp={group.size()}")), group, peers(group, folder)
    )
    for module in model.modules():
        if hasattr(module, "join"):
            module.join = None
    return model


def spread(group, folder, config, policies, grid, chunks, peers=FilePeers):
    with torch.inference_mode():
        model = fused(group, config, folder, peers)
        heads = config.num_heads // group.size()
        return [[stream(model, config, policy, grid, chunks, heads).numpy() for policy in policies]]


def test_two_ranks_make_what_one_makes(on_ranks, tmp_path):
    arguments = (SMALL, tuple(CachePolicy), GRID, CHUNKS)
    found = errors(on_ranks(2, spread, tmp_path, *arguments), *arguments)
    print(f"2 ranks: {max(found):.1e}")
    assert len(found) == 2 * 3
    assert max(found) <= TOLERANCE


def late(group, folder, *arguments):
    return spread(group, folder, *arguments, peers=Late)


def test_a_late_rank_finds_what_was_meant_for_it(on_ranks, tmp_path):
    arguments = (FP8_SIZE, (CachePolicy.RECOMPUTE,), GRID, 2)
    assert max(errors(on_ranks(2, late, tmp_path, *arguments), *arguments)) <= TOLERANCE


@pytest.mark.slow
def test_four_ranks_make_what_one_makes(on_ranks, tmp_path):
    arguments = (SMALL, (CachePolicy.RECOMPUTE,), GRID, CHUNKS)
    found = errors(on_ranks(4, spread, tmp_path, *arguments), *arguments)
    print(f"4 ranks: {max(found):.1e}")
    assert max(found) <= TOLERANCE


def rounded_product(x, layer, out=None):
    """A product that rounds its input itself: Triton's interpreter misrounds to fp8, and must leave it out."""
    return dequantised_product(Rows(x.values.to(FP8), x.scale), layer, out)


def quantised(group, folder):
    with torch.inference_mode():
        model = fused(group, FP8_SIZE, folder)
        model.elementwise.add_norm.__self__.rows_dtype = torch.float32
        assert apply_fp8(model, product=rounded_product) == 2 * 8
        heads = FP8_SIZE.num_heads // group.size()
        return stream(model, FP8_SIZE, CachePolicy.RECOMPUTE, GRID, 2, heads).numpy()


def test_fp8_ranks_make_what_one_makes(on_ranks, tmp_path):
    """As near to fp32 as the quantised single model, as tensor parallelism with collectives is."""
    plain, alone = build(FP8_SIZE), build(FP8_SIZE)
    apply_fp8(alone, product=dequantised_product)
    with torch.inference_mode():
        exact, want = (stream(m, FP8_SIZE, CachePolicy.RECOMPUTE, GRID, 2) for m in (plain, alone))
    off = ((want - exact).norm() / exact.norm()).item()
    assert 1e-3 < off < 0.1
    for made in on_ranks(2, quantised, tmp_path):
        error = ((torch.from_numpy(made) - exact).norm() / exact.norm()).item()
        print(f"one {off:.1e}, two {error:.1e} from fp32")
        assert error < 1.3 * off


class Alone:
    """One rank, whose memory nobody shares."""

    rank, size = 0, 1

    def empty(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def addresses(self, tensor):
        return torch.tensor([tensor.data_ptr()])


def test_buffers_grow_and_stay():
    buffers = SharedBuffers(Alone())
    with torch.inference_mode():
        small = buffers.take("partial", (1, 4, 8), torch.float32)
    small.here.fill_(1.0)  # taken in inference mode, yet writable outside
    assert buffers.take("partial", (2, 8), torch.float32).here.data_ptr() == small.here.data_ptr()
    assert buffers.take("partial", (1, 4, 8), torch.float16).here.data_ptr() != small.here.data_ptr()
    large = buffers.take("partial", (1, 6, 8), torch.float32)
    assert large.here.shape == (1, 6, 8)
    assert large.addresses.item() == large.here.data_ptr() != small.here.data_ptr()
    assert buffers.take("partial", (1, 4, 8), torch.float32).here.data_ptr() == large.here.data_ptr()


def waits(group, folder):
    """Waits of an embedded prompt, a denoising and a context pass."""
    made = []
    with torch.inference_mode():
        model = fused(group, SMALL, folder, Counting)
        peers = model.elementwise.add_norm.__self__._peers
        cache = KVCache.allocate(
            SMALL, policy=CachePolicy.RECOMPUTE, frames=3, grid=GRID, heads=SMALL.num_heads // group.size()
        )

        def count(call, *arguments, **options):
            call(*arguments, **options)  # takes the buffers
            before = peers.waits
            result = call(*arguments, **options)
            made.append(peers.waits - before)
            return result

        text = count(model.embed_text, torch.randn(1, 9, SMALL.text_dim))
        latents = torch.randn(1, 16, 3, 4, 8)
        for pass_ in (Pass.DENOISE, Pass.CONTEXT):
            count(model, latents, torch.zeros(1, 3), text, cache, pass_=pass_)
    return made


def test_waits_are_those_that_the_argument_needs(on_ranks, tmp_path):
    """Two an exchange of tokens, one an exchange of squares, and one more where nothing lies in between."""
    layers = SMALL.num_layers
    denoise = 2 * 3 * layers + 2 * layers + 1
    context = 2 * 3 * (layers - 1) + 2 * (layers - 1) + 1 + 1
    assert on_ranks(2, waits, tmp_path) == [[2 * layers, denoise, context]] * 2


def odd(group, folder):
    """Five tokens a frame: 15 are not spread over two ranks, and this model has only collectives for them."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("wanrt.parallel").addHandler(handler)
    with torch.inference_mode():
        model = apply(build(SMALL), ShardPlan.of(Topology.parse("tp=2")), group, FilePeers(group, folder))
        made = stream(model, SMALL, CachePolicy.RECOMPUTE, (1, 5), 2, SMALL.num_heads // 2).numpy()
    return made, records


def test_tokens_that_cannot_be_spread_are_summed_by_collectives(on_ranks, tmp_path):
    with torch.inference_mode():
        want = stream(build(SMALL), SMALL, CachePolicy.RECOMPUTE, (1, 5), 2)
    for made, records in on_ranks(2, odd, tmp_path):
        assert (torch.from_numpy(made) - want).abs().max() <= TOLERANCE * want.abs().max()
        assert len([r for r in records if "1 x 15 tokens: partial products summed by collectives" in r]) == 1
