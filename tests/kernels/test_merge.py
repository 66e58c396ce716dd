"""Merged attention: kernel against reference, reference against one softmax over all keys."""

import math

import pytest
import torch

from wanrt_kernels.merge import launch, merge, merge_ref

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CASES = [(1, 5, 3, 16), (2, 4, 2, 20), (1, 1, 1, 2), (1, 2, 40, 128)]  # batch, queries, heads, head_dim


def make(case, dtype, device):
    """Outputs laid out as attention kernels leave them: heads outside or inside, at random."""
    batch, queries, heads, head_dim = case
    generator = torch.Generator().manual_seed(queries)
    biased = torch.randn(batch, queries, heads, head_dim, generator=generator)
    plain = torch.randn(batch, heads, queries, head_dim, generator=generator).transpose(1, 2)
    lses = torch.randn(2, batch, heads, queries, generator=generator) * 4
    bias = torch.tensor(0.3).log()
    biased, plain = biased.to(device, dtype), plain.to(device, dtype)
    return biased, lses[0].to(device), plain, lses[1].to(device), bias.to(device)


def compare(case, dtype, device):
    args = make(case, dtype, device)
    got, want = launch(*args), merge_ref(*args)
    assert got.is_contiguous()
    assert (got.float() - want.float()).abs().max() <= TOLERANCE[dtype] * want.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, (1, 2160, 40, 128)])
def test_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cuda")


@pytest.mark.gpu
def test_kernel_compiles_into_one_graph():
    args = make(CASES[0], torch.float32, "cuda")
    torch.testing.assert_close(torch.compile(merge, fullgraph=True)(*args), merge_ref(*args))


@pytest.mark.parametrize("b", [1.0, 0.3, 1e-6])
def test_reference_equals_one_softmax(b):
    q, k, v = (
        torch.randn(2, 4, 3, 8).double(),
        torch.randn(2, 9, 3, 8).double(),
        torch.randn(2, 9, 3, 8).double(),
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)

    def part(keys, bias=0.0):
        s = scores[..., keys] + bias
        return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v[:, keys]).float(), s.logsumexp(-1).float()

    got = merge_ref(*part(slice(0, 4)), *part(slice(4, 9)), torch.tensor(b).log())
    weights = scores.clone()
    weights[..., :4] += math.log(b)
    want = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_wrong_shapes_say_what_was_expected():
    biased, a, plain, b, bias = make(CASES[1], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"plain_lse: got .*\(2, 4, 2\); expected fp32 \[2, 2, 4\]"):
        merge(biased, a, plain, b.transpose(1, 2), bias)
    with pytest.raises(ValueError, match="bias: got shape"):
        merge(biased, a, plain, b, bias[None])
    with pytest.raises(ValueError, match="biased, plain"):
        merge(biased[:, :1], a, plain, b, bias)
