"""Biased attention against an fp64 softmax written out."""

import math

import pytest
import torch

from wanrt.models.attention import AttentionBackend, KeyBias, attend, choose

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

ON_CPU = [AttentionBackend.AUTO, AttentionBackend.SDPA, AttentionBackend.MATH]


def softmax_attention(q, k, v, log_bias=0.0, keys=0):
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores[..., :keys] += log_bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def draw_qkv(dtype, tq, tk, *, heads=3, dim=16, device="cpu"):
    generator = torch.Generator().manual_seed(tq * 100 + tk)
    shapes = ((2, tq, heads, dim), (2, tk, heads, dim), (2, tk, heads, dim))
    return [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in shapes]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("tq", "tk", "keys"), [(5, 9, 4), (7, 7, 0), (1, 3, 2), (33, 130, 65)])
@pytest.mark.parametrize("b", [1.0, 0.3, 1e-4])
def test_attend_equals_softmax(dtype, backend, tq, tk, keys, b):
    q, k, v = draw_qkv(dtype, tq, tk)
    got = attend(q, k, v, KeyBias(torch.tensor(b).log(), keys), backend=backend)
    assert got.dtype == dtype
    error = (got.double() - softmax_attention(q, k, v, math.log(b), keys)).abs().max().item()
    assert error <= TOLERANCES[dtype]


def test_no_bias_is_plain_attention():
    q, k, v = draw_qkv(torch.float32, 4, 6)
    torch.testing.assert_close(attend(q, k, v).double(), softmax_attention(q, k, v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_of_a_buffer_need_no_copies(backend):
    """Keys that are a slice of a longer buffer, filled with NaN elsewhere."""
    q, k, v = draw_qkv(torch.float32, 4, 12)
    long_k, long_v = (torch.full((2, 20, 3, 16), torch.nan) for _ in range(2))
    long_k[:, 5:17], long_v[:, 5:17] = k, v
    got = attend(q, long_k[:, 5:17], long_v[:, 5:17], KeyBias(torch.tensor(-1.0), 3), backend=backend)
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v, -1.0, 3), rtol=0, atol=2e-6)


def test_auto_on_a_cpu_is_torch_and_force_is_force():
    cpu = torch.device("cpu")
    assert choose(AttentionBackend.AUTO, cpu, torch.bfloat16, 128) is AttentionBackend.SDPA
    assert choose(AttentionBackend.MATH, cpu, torch.bfloat16, 128) is AttentionBackend.MATH


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize(("tq", "tk", "keys"), [(2160, 4320, 1440), (720, 1440, 0), (333, 1001, 500)])
def test_attend_equals_softmax_on_cuda(dtype, backend, tq, tk, keys):
    if dtype is torch.float32 and backend in (AttentionBackend.CUDNN, AttentionBackend.FLASH):
        pytest.skip("half precisions only")
    q, k, v = draw_qkv(dtype, tq, tk, heads=2, dim=128, device="cuda")
    bias = torch.tensor(0.3, device="cuda").log()
    got = attend(q, k, v, KeyBias(bias, keys), backend=backend)
    error = (got.double() - softmax_attention(q, k, v, math.log(0.3), keys)).abs().max().item()
    assert error <= TOLERANCES[dtype]
