"""Residual + LayerNorm + modulation of partial products: every rank's kernel, in one process, against reference."""

import pytest
import torch

from tests.kernels.ranks import among
from wanrt_kernels.adaln import add_norm_ref
from wanrt_kernels.quant_rows import FP8, Rows
from wanrt_kernels.shared import Shared
from wanrt_kernels.shared_add_norm import (
    shared_add_norm,
    shared_add_norm_ref,
    shared_add_norm_rows,
    shared_add_norm_rows_ref,
)

# relative to the largest value; half precisions round once on the way out
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

CASES = [
    # ranks, frames, tokens a frame, channels, what is there
    (2, 3, 4, 96, {"gate"}),
    (4, 3, 4, 33, {"gate"}),
    (3, 2, 3, 40, {"affine"}),
    (2, 1, 4, 1536, {"fp32"}),
    (8, 1, 8, 640, {"gate", "affine"}),
    (2, 2, 1, 5120, {"gate"}),
]
LARGE = (2, 3, 720, 5120, {"gate"})


def make(case, dtype, device):
    ranks, frames, tokens, channels, options = case
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape, dtype=torch.float32):
        return (torch.randn(shape, generator=generator) + 0.2).to(device, dtype)

    six = draw(1, frames, 6, channels)  # gate, scale and shift are views of one projection, as in the model
    affine = "affine" in options
    x = draw(1, frames * tokens, channels, dtype=dtype)
    partials = [draw(1, frames * tokens, channels, dtype=dtype) for _ in range(ranks)]
    modulation = (
        six[:, :, 2] if "gate" in options else None,
        draw(channels, dtype=dtype) if affine else six[:, :, 1],
        draw(channels, dtype=dtype) if affine else six[:, :, 0],
    )
    return x.chunk(ranks, dim=1), partials, modulation, {"eps": 1e-6, "plus_one": not affine}


def near(got, want, tolerance):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert (got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


def compare(case, dtype, device):
    shares, partials, modulation, options = make(case, dtype, device)
    normed_dtype = torch.float32 if "fp32" in case[-1] else dtype
    outs = [torch.full_like(part, torch.nan, dtype=normed_dtype) for part in partials]
    wanted = []
    for rank, x in enumerate(shares):
        partial, out = (among(tensors, rank) for tensors in (partials, outs))
        total = shared_add_norm(x, partial, *modulation, out, rank=rank, **options)
        want, normed = shared_add_norm_ref(
            x, partials, *modulation, rank=rank, normed_dtype=normed_dtype, **options
        )
        near(total, want, TOLERANCE[dtype])
        wanted.append(normed)
    for out in outs:
        near(out, torch.cat(wanted, dim=1), TOLERANCE[normed_dtype])
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, LARGE])
def test_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cuda")


STEP, RARE = 2.0**-3, 2e-3  # one step of e4m3, for numbers beside a tie; and how many may be that


def compare_rows(case, dtype, device):
    shares, partials, modulation, options = make(case, dtype, device)
    # Triton's interpreter misrounds to fp8, as in test_quant_rows
    values = [torch.zeros_like(p, dtype=torch.float32 if device == "cpu" else FP8) for p in partials]
    scales = [torch.zeros(*p.shape[:-1], 1, device=device) for p in partials]
    wanted = []
    for rank, x in enumerate(shares):
        partial, out, scale = (among(tensors, rank) for tensors in (partials, values, scales))
        total = shared_add_norm_rows(x, partial, *modulation, out, scale, rank=rank, **options)
        want, rows = shared_add_norm_rows_ref(x, partials, *modulation, rank=rank, **options)
        near(total, want, TOLERANCE[dtype])
        wanted.append(rows)
    want = Rows(*(torch.cat(parts, dim=1) for parts in zip(*wanted, strict=True)))
    for value, scale in zip(values, scales, strict=True):
        torch.testing.assert_close(scale, want.scale, rtol=TOLERANCE[torch.float32], atol=0)
        ours, theirs = value.to(FP8).float(), want.values.float()
        assert ((ours - theirs).abs() <= STEP * theirs.abs() + 2.0**-9).all()
        assert (ours != theirs).sum() <= max(1, RARE * ours.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_rows_equal_reference(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare_rows(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, LARGE])
def test_rows_equal_reference(case, dtype):
    compare_rows(case, dtype, "cuda")


def test_reference_is_add_norm_of_the_sum():
    shares, partials, modulation, options = make(CASES[0], torch.float32, "cpu")
    whole = add_norm_ref(torch.cat(shares, dim=1), sum(partials), *modulation, **options)
    parts = [
        shared_add_norm_ref(x, partials, *modulation, rank=rank, **options) for rank, x in enumerate(shares)
    ]
    for want, got in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(got, dim=1), want)


def test_wrong_shapes_say_what_was_expected():
    shares, partials, (gate, scale, shift), options = make(CASES[0], torch.float32, "cpu")
    partial, out = among(partials, 0), among(partials, 0)
    with pytest.raises(ValueError, match=r"partial: got .*\(1, 12, 96\).*; expected .*\(1, 24, 96\)"):
        shared_add_norm(torch.cat(shares, 1), partial, gate, scale, shift, out, rank=0, **options)
    with pytest.raises(ValueError, match=r"rank 2; expected .* one of 2 ranks"):
        shared_add_norm(shares[0], partial, gate, scale, shift, out, rank=2, **options)
    scales = among([torch.zeros(1, 12)] * 2, 0)
    with pytest.raises(ValueError, match=r"row_scale: got .*\(1, 12\)"):
        shared_add_norm_rows(shares[0], partial, gate, scale, shift, out, scales, rank=0, **options)
    wrong = Shared(out.here, out.addresses.int())
    with pytest.raises(ValueError, match=r"out: got addresses torch\.int32"):
        shared_add_norm(shares[0], partial, gate, scale, shift, wrong, rank=0, **options)
    with pytest.raises(ValueError, match="scale: got shape"):
        shared_add_norm(shares[0], partial, gate, scale[..., :8], shift, out, rank=0, **options)
