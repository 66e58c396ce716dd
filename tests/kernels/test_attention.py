"""Attention with a biased run of keys: kernel and reference against fp64, on strided views."""

import math

import pytest
import torch

from wanrt_kernels.attention import CONFIGS, FP32, AttentionConfig, attention, attention_ref, launch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# batch, queries, keys, heads, head_dim, biased keys
CASES = [
    (2, 5, 9, 3, 16, 4),
    (1, 33, 70, 2, 48, 0),
    (1, 33, 70, 2, 48, 70),
    (1, 64, 128, 1, 64, 64),  # whole blocks only
    (1, 7, 150, 2, 64, 75),  # what is left takes two blocks
    (1, 40, 135, 1, 128, 97),
    (1, 1, 1, 1, 16, 1),
]
REAL = [(1, 2160, 4320, 10, 128, 1440), (1, 4680, 9360, 2, 128, 3120), (2, 1001, 777, 3, 80, 333)]


def oracle(q, k, v, bias, keys):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    scores[..., :keys] += bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())


def make(case, dtype, device):
    """Queries of a joined projection, keys and values as slices of longer buffers that hold NaN elsewhere."""
    batch, queries, keys, heads, dim, _ = case
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    q = torch.randn(batch, queries, heads, 3, dim, generator=generator)
    k, v = (torch.full((batch, keys + 8, heads, dim), torch.nan) for _ in range(2))
    for x in (k, v):
        x[:, 3 : 3 + keys] = torch.randn(batch, keys, heads, dim, generator=generator)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return q[:, :, :, 1], k[:, 3 : 3 + keys], v[:, 3 : 3 + keys]


def compare(case, dtype, device, b=0.3, config=None):
    q, k, v = make(case, dtype, device)
    bias = torch.tensor(b, device=device).log()
    got = launch(q, k, v, bias, case[-1], config)
    assert got.is_contiguous()
    assert got.dtype is dtype
    want = oracle(q, k, v, math.log(b), case[-1])
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1, want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_softmax(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(case, dtype, "cpu")


@pytest.mark.parametrize("config", [AttentionConfig(16, 32, 4, 1), AttentionConfig(64, 16, 4, 1)])
@pytest.mark.parametrize("b", [1.0, 1e-4])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_in_other_tiles(config, b):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(CASES[5], torch.float32, "cpu", b, config)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_without_bias(case):
    pytest.importorskip("triton", reason="Triton is not installed")
    q, k, v = make(case, torch.float32, "cpu")
    torch.testing.assert_close(launch(q, k, v, None, 0).double(), oracle(q, k, v, 0.0, 0), rtol=0, atol=2e-6)


def make_text(counts, keys, dtype, device, queries=33, heads=2, dim=48):
    """A text of `counts` keys a batch entry, the last of each repeated to `keys`, as q, k, v, count and last_bias."""
    case = (len(counts), queries, keys, heads, dim, 0)
    q, k, v = make(case, dtype, device)
    for entry, count in enumerate(counts):
        for x in (k, v):
            x[entry, count:] = x[entry, count - 1]
    count = torch.tensor(counts, dtype=torch.int32, device=device)
    return q, k, v, count, (keys + 1 - count).float().log()


def compare_text(q, k, v, count, last_bias, config=None):
    """Against fp64 over all keys; what lies behind `count` is NaN for the kernel, which must not read it."""
    want = oracle(q, k, v, 0.0, 0)
    k, v = k.clone(), v.clone()
    for entry, own in enumerate(count.tolist()):
        k[entry, own:], v[entry, own:] = torch.nan, torch.nan
    got = launch(q, k, v, count=count, last_bias=last_bias, config=config)
    assert (got.double() - want).abs().max() <= TOLERANCE[q.dtype] * max(1, want.abs().max())


# around the blocks of 32 and 64 keys
COUNTS = [(1, 2), (2, 70), (70, 1), (31, 32), (33, 64), (65, 69)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_takes_one_key_for_all_padding(counts, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare_text(*make_text(counts, 70, dtype, "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_takes_one_key_for_all_padding_in_other_tiles():
    pytest.importorskip("triton", reason="Triton is not installed")
    compare_text(*make_text((16, 49), 70, torch.float32, "cpu"), AttentionConfig(16, 16, 4, 1))


@pytest.mark.parametrize("counts", COUNTS)
def test_reference_takes_one_key_for_all_padding(counts):
    q, k, v, count, last_bias = make_text(counts, 70, torch.float32, "cpu")
    got = attention(q, k, v, count=count, last_bias=last_bias)
    torch.testing.assert_close(got.double(), oracle(q, k, v, 0.0, 0), rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("counts", COUNTS)
def test_kernel_takes_one_key_for_all_padding(counts, dtype):
    compare_text(*make_text(counts, 70, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [(1,), (25,), (101,), (128,), (129,), (511,), (512,)])
def test_kernel_takes_one_key_for_all_padding_of_a_prompt(counts):
    compare_text(*make_text(counts, 512, torch.bfloat16, "cuda", queries=2160, heads=40, dim=128))


@pytest.mark.gpu
def test_count_is_read_on_the_device():
    """A captured graph sees the count and the bias that their tensors hold when it runs."""
    q, k, v, count, last_bias = make_text((5, 70), 70, torch.float16, "cuda")
    attention(q, k, v, count=count, last_bias=last_bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, count=count, last_bias=last_bias)
    _, k2, v2, count2, last_bias2 = make_text((66, 2), 70, torch.float16, "cuda")
    for mine, theirs in zip((k, v, count, last_bias), (k2, v2, count2, last_bias2), strict=True):
        mine.copy_(theirs)
    graph.replay()
    assert torch.equal(out, attention(q, k2, v2, count=count2, last_bias=last_bias2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, *REAL])
def test_kernel_equals_softmax(case, dtype):
    compare(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernel_without_bias(dtype):
    q, k, v = make(REAL[0], dtype, "cuda")
    error = (attention(q, k, v).double() - oracle(q, k, v, 0.0, 0)).abs().max()
    assert error <= TOLERANCE[dtype]


@pytest.mark.gpu
def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = make(REAL[0], torch.bfloat16, "cuda")
    bias = torch.tensor(-30.0, device="cuda")
    got = attention(20 * q, k, v, bias, 1440)
    assert (got.double() - oracle(20 * q, k, v, -30.0, 1440)).abs().max() <= 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
def test_kernel_compiles_into_one_graph(biased):
    q, k, v = make(REAL[2], torch.bfloat16, "cuda")
    rest = (torch.tensor(0.3, device="cuda").log(), 333) if biased else ()
    assert torch.equal(torch.compile(attention, fullgraph=True)(q, k, v, *rest), attention(q, k, v, *rest))


@pytest.mark.gpu
def test_kernel_with_a_count_compiles_into_one_graph():
    q, k, v, count, last_bias = make_text((5, 70), 70, torch.bfloat16, "cuda")
    compiled = torch.compile(attention, fullgraph=True)
    got = compiled(q, k, v, count=count, last_bias=last_bias)
    assert torch.equal(got, attention(q, k, v, count=count, last_bias=last_bias))


@pytest.mark.gpu
def test_bias_is_read_on_the_device():
    """A captured graph sees the bias that its tensor holds when it runs."""
    q, k, v = make(CASES[3], torch.float16, "cuda")
    bias = torch.zeros((), device="cuda")
    attention(q, k, v, bias, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, bias, 64)
    bias.fill_(-2.0)
    graph.replay()
    assert torch.equal(out, attention(q, k, v, bias, 64))


@pytest.mark.parametrize("case", CASES)
def test_on_a_cpu_the_reference_serves(case):
    q, k, v = make(case, torch.float32, "cpu")
    bias = torch.tensor(0.3).log()
    got = attention(q, k, v, bias, case[-1])
    assert torch.equal(got, attention_ref(q, k, v, bias, case[-1]))
    torch.testing.assert_close(got.double(), oracle(q, k, v, math.log(0.3), case[-1]), rtol=0, atol=2e-6)


def test_every_device_has_a_config():
    assert AttentionConfig.choose(128, torch.bfloat16, 9) is CONFIGS[9, True]
    assert AttentionConfig.choose(64, torch.float16, 12) is CONFIGS[8, False]
    assert AttentionConfig.choose(128, torch.float32, 9) is FP32


def test_what_does_not_fit_is_refused():
    q, k, v = make(CASES[0], torch.float32, "cpu")
    bias = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"q: got .*\(2, 5, 3, 12\); expected .* a multiple of 16 up to 128"):
        attention(q[..., :12], k, v)
    with pytest.raises(ValueError, match=r"q: got torch.float64"):
        attention(q.double(), k, v)
    with pytest.raises(ValueError, match="k, v: got shapes"):
        attention(q, k, v[:, :2])
    with pytest.raises(ValueError, match=r"k, v: got shapes .* Tk > 0"):
        attention(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r"v: got torch.float16"):
        attention(q, k, v.half())
    with pytest.raises(ValueError, match=r"k: got .*contiguous D"):
        attention(q, k.transpose(1, 3).contiguous().transpose(1, 3), v)
    with pytest.raises(ValueError, match=r"bias: got shape \(1,\)"):
        attention(q, k, v, bias[None], 1)
    with pytest.raises(ValueError, match=r"for 10 keys; expected a 0-dim tensor, 0 to 9 keys"):
        attention(q, k, v, bias, 10)
    count = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected both, and no bias"):
        attention(q, k, v, count=count)
    with pytest.raises(ValueError, match="expected both, and no bias"):
        attention(q, k, v, bias, 1, count, torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"count: got torch.int64 \(2,\).*; expected contiguous torch.int32 \(2,\)"
    ):
        attention(q, k, v, count=count.long(), last_bias=torch.zeros(2))
    with pytest.raises(ValueError, match=r"last_bias: got torch.float32 \(1,\)"):
        attention(q, k, v, count=count, last_bias=torch.zeros(1))
