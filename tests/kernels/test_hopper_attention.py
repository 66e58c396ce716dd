"""Hopper's attention: who computes what here, its numbers on a GPU."""

import math
from collections import Counter

import pytest
import torch

from wanrt_kernels import hopper_attention as hopper
from wanrt_kernels import nvrtc
from wanrt_kernels.hopper import ARCHITECTURE, SHARED_BYTES, TYPES
from wanrt_kernels.hopper_attention import (
    HEAD_DIM,
    KEYS,
    QUERIES,
    Form,
    Schedule,
    hopper_attention,
    hopper_attention_to,
    launch,
    unsupported,
)
from wanrt_kernels.peer_heads import OwnTokens, scatter_tokens_ref

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
# heads, queries, blocks of keys, multiprocessors
CALLS = [
    (40, 2160, 30, 132),
    (20, 2160, 30, 132),
    (5, 2160, 30, 132),
    (40, 4680, 65, 132),
    (1, 100, 200, 132),
    (3, 300, 5, 78),
]


def runs(plan, blocks, processors):
    """What the kernel's `Walk` gives: (block, tile, first, last), runs of blocks of keys."""
    units = plan.shared * blocks
    for block in range(max(min(processors, plan.whole), plan.sharers)):
        for tile in range(block, plan.whole, processors):
            yield block, tile, 0, blocks
        unit, end = (units * (block + step) // plan.sharers if block < plan.sharers else 0 for step in (0, 1))
        while unit < end:
            last = min(blocks, unit % blocks + end - unit)
            yield block, plan.whole + unit // blocks, unit % blocks, last
            unit += last - unit % blocks


@pytest.mark.parametrize("call", CALLS)
def test_every_block_of_keys_is_somebodys(call):
    heads, queries, blocks, processors = call
    plan = Schedule.choose(heads, queries, blocks, processors)
    assert plan.tiles == heads * math.ceil(queries / QUERIES)
    seen = Counter(
        (tile, key) for _, tile, first, last in runs(plan, blocks, processors) for key in range(first, last)
    )
    assert set(seen) == {(tile, key) for tile in range(plan.tiles) for key in range(blocks)}
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("call", CALLS)
def test_a_sharer_has_room_for_its_parts(call):
    """It has two slots: one for the tile it begins with, one for the next."""
    heads, queries, blocks, processors = call
    plan = Schedule.choose(heads, queries, blocks, processors)
    shared = Counter(block for block, tile, *_ in runs(plan, blocks, processors) if tile >= plan.whole)
    assert max(shared.values(), default=0) <= 2
    # who has a unit is found by a formula; the first and the last of a tile's sharers are all it takes
    units = plan.shared * blocks
    for block, tile, first, last in runs(plan, blocks, processors):
        if tile >= plan.whole:
            for unit in ((tile - plan.whole) * blocks + first, (tile - plan.whole) * blocks + last - 1):
                assert ((unit + 1) * plan.sharers - 1) // units == block


def test_sharing_evens_out_the_last_round():
    """40 heads of 2160 queries are 5.2 rounds of tiles."""
    plan = Schedule.choose(40, 2160, 30, 132)
    work = Counter()
    for block, _, first, last in runs(plan, 30, 132):
        work[block] += last - first
    assert max(work.values()) <= 5 * 30 + 5


@pytest.mark.parametrize("call", [(40, 2160, 1, 132), (33, 512, 30, 132), (131, 128, 30, 132)])
def test_tiles_stay_whole_where_sharing_gains_nothing(call):
    assert Schedule.choose(*call).sharers == 0
    assert Schedule.choose(40, 2160, 30, 132, share=False).shared == 0


def test_shared_memory_holds_queries_keys_values_and_barriers():
    stages = 2
    data = stages * 2 * HEAD_DIM * (QUERIES + 2 * KEYS)
    assert 1024 + data + 3 * 2 * 8 * stages + 8 <= SHARED_BYTES
    assert KEYS % 16 == 0


@pytest.mark.parametrize("kind", [kind for kind, _ in TYPES.values()])
def test_it_compiles(kind):
    try:
        nvrtc.nvrtc()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    assert nvrtc.compile_cubin(Form(KEYS, kind).source(), ARCHITECTURE)


def test_other_devices_and_heads_are_refused(monkeypatch):
    assert unsupported(torch.device("cpu"), 128, torch.float16) == "cpu is not a CUDA device"
    q = torch.zeros(1, 3, 2, 128)
    with pytest.raises(ValueError, match=r"not a CUDA device; use wanrt_kernels\.attention"):
        hopper_attention(q, q, q)
    monkeypatch.setattr(hopper, "unsupported_device", lambda device, dtype: None)
    assert unsupported(torch.device("cuda", 0), 64, torch.float16) == "heads of 64, not 128"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 5, 3, 128)}, r"k: got torch.float32 \(1, 5, 3, 128\)"),
        ({"keys": 6}, "keys: got 6 biased of 5; expected at least one key"),
        ({"q": torch.zeros(1, 3, 2, 130)[..., 2:]}, "q: got strides .* expected contiguous heads"),
        ({"bias": torch.zeros((), dtype=torch.float16)}, "bias: got torch.float16 on cpu; expected fp32"),
        ({"count": torch.ones(1, dtype=torch.int32)}, "count, last_bias: got one of them"),
        (
            {"count": torch.ones(2, dtype=torch.int32), "last_bias": torch.zeros(1)},
            r"count: got torch.int32 \(2,\).* expected contiguous torch.int32 \(1,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, change, message):
    monkeypatch.setattr(hopper, "unsupported", lambda *about: None)
    fitting = {"q": torch.zeros(1, 3, 2, 128), "k": torch.zeros(1, 5, 2, 128), "v": torch.zeros(1, 5, 2, 128)}
    with pytest.raises(ValueError, match=message):
        launch(**{**fitting, **change})


def make(batch, queries, keys, heads, dtype, device="cuda"):
    """Queries of a joined projection, keys and values as slices of longer buffers that hold NaN elsewhere."""
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(batch, queries, heads, 3, HEAD_DIM, generator=generator).to(device, dtype)[:, :, :, 1]
    both = []
    for _ in range(2):
        x = torch.full((batch, keys + 8, heads, HEAD_DIM), torch.nan, dtype=dtype)
        x[:, 3 : 3 + keys] = torch.randn(batch, keys, heads, HEAD_DIM, generator=generator)
        both.append(x.to(device)[:, 3 : 3 + keys])
    return q, *both


def oracle(q, k, v, added):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(HEAD_DIM) + added
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())


def assert_close(got, want, dtype):
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", [KEYS, 128])
@pytest.mark.parametrize(
    "case",
    [
        (1, 128, 144, 1, 0), (1, 40, 135, 1, 97), (2, 33, 70, 2, 70), (1, 1, 1, 1, 1), (2, 1001, 777, 3, 333),
        (1, 2160, 4320, 4, 1440), (1, 4680, 9360, 2, 3120), (1, 720, 15120, 3, 0),
    ],
)  # fmt: skip
def test_gpu_kernel_equals_softmax(case, block, dtype):
    *sizes, biased = case
    skip_unless_hopper(dtype)
    q, k, v = make(*sizes, dtype)
    bias = torch.tensor(0.3, device="cuda").log()
    added = torch.zeros(k.shape[1], device="cuda", dtype=torch.float64)
    added[:biased] = math.log(0.3)
    got = launch(q, k, v, bias, biased, block=block)
    assert got.is_contiguous()
    assert_close(got, oracle(q, k, v, added), dtype)
    assert torch.equal(got, launch(q, k, v, bias, biased, block=block)), "the same bits every time"


@pytest.mark.gpu
def test_gpu_kernel_reads_how_many_keys_there_are():
    """And adds the last one's bias, each batch entry its own; a captured graph sees them change."""
    skip_unless_hopper(torch.bfloat16)
    q, k, v = make(3, 200, 512, 2, torch.bfloat16)
    count = torch.tensor([1, 100, 512], dtype=torch.int32, device="cuda")
    last = torch.tensor([3.0, 6.0, 0.0], device="cuda")
    launch(q, k, v, None, 0, count, last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch(q, k, v, None, 0, count, last)
    for counts in ([1, 100, 512], [144, 145, 7]):
        count.copy_(torch.tensor(counts))
        graph.replay()
        added = torch.zeros(3, 1, 1, 512, device="cuda", dtype=torch.float64)
        for entry, (number, bias) in enumerate(zip(counts, last.tolist(), strict=True)):
            added[entry, ..., number:] = -torch.inf
            added[entry, ..., number - 1] = bias
        assert_close(got, oracle(q, k, v, added), torch.bfloat16)


@pytest.mark.gpu
def test_gpu_kernel_stores_where_tokens_belong():
    skip_unless_hopper(torch.bfloat16)
    ranks, frames, tokens, heads = 2, 3, 100, 4
    q, k, v = make(1, frames * ranks * tokens, 700, heads, torch.bfloat16)
    bias = torch.tensor(-1.0, device="cuda")
    got, want = (
        [
            torch.zeros(frames * tokens, ranks * heads, HEAD_DIM, device="cuda", dtype=q.dtype)
            for _ in range(ranks)
        ]
        for _ in range(2)
    )
    addresses = torch.tensor([x.data_ptr() for x in got], device="cuda")
    for rank in range(ranks):
        own = OwnTokens(rank, ranks, frames, tokens)
        hopper_attention_to(q, k, v, bias, 100, addresses, own)
        scatter_tokens_ref(hopper_attention(q, k, v, bias, 100)[0], want, own)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_gpu_kernel_is_one_operator_of_a_compiled_graph():
    skip_unless_hopper(torch.bfloat16)
    q, k, v = make(1, 300, 500, 2, torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: hopper_attention(q, k, v) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), hopper_attention(q, k, v) * 2)


def skip_unless_hopper(dtype):
    if reason := unsupported(torch.device("cuda", 0), HEAD_DIM, dtype):
        pytest.skip(reason)
