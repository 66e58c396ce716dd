"""Residual + LayerNorm + modulation: kernel against reference, reference against torch's own modules."""

import pytest
import torch

from wanrt_kernels.adaln import (
    add_norm,
    add_norm_ref,
    add_norm_rows,
    add_norm_rows_ref,
    launch,
    launch_rows,
)
from wanrt_kernels.quant_rows import FP8, Rows

# relative to the largest value; half precisions round once on the way out
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

CASES = [
    # batch, frames, tokens a frame, channels, what is there
    (1, 3, 4, 96, {"update", "gate"}),
    (2, 3, 5, 40, {"update", "gate"}),
    (2, 2, 3, 40, {"update", "affine"}),
    (1, 1, 7, 33, set()),
    (1, 2, 2, 1536, {"update", "fp32"}),
    (1, 2, 1, 5120, {"update", "gate", "affine"}),
    (2, 2, 3, 40, {"update", "gate", "affine", "ahead"}),
]


def make(case, dtype, device):
    batch, frames, tokens, channels, options = case
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape, dtype=torch.float32):
        return (torch.randn(shape, generator=generator) + 0.2).to(device, dtype)

    six = draw(
        batch, frames, 6, channels
    )  # gate, scale and shift are views of one projection, as in the model
    affine = "affine" in options
    return (
        draw(batch, frames * tokens, channels, dtype=dtype),
        draw(batch, frames * tokens, channels, dtype=dtype) if "update" in options else None,
        six[:, :, 2] if "gate" in options else None,
        draw(channels, dtype=dtype) if affine else six[:, :, 1],
        draw(channels, dtype=dtype) if affine else six[:, :, 0],
    ), {
        "eps": 1e-6,
        "plus_one": not affine,
        "normed_dtype": torch.float32 if "fp32" in options else None,
        **({"ahead": draw(channels, dtype=dtype)} if "ahead" in options else {}),
    }


def compare(case, dtype, device):
    args, options = make(case, dtype, device)
    for got, want in zip(launch(*args, **options), add_norm_ref(*args, **options), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert (got.float() - want.float()).abs().max() <= TOLERANCE[dtype] * want.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, (1, 3, 720, 5120, {"update", "gate"})])
def test_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cuda")


STEP, RARE = 2.0**-3, 2e-3  # one step of e4m3, for numbers beside a tie; and how many may be that


def compare_rows(case, dtype, device):
    args, options = make(case, dtype, device)
    options.pop("normed_dtype")
    options.pop("ahead", None)
    if device == "cpu":  # Triton's interpreter misrounds to fp8, as in test_quant_rows
        total, (values, scale) = launch_rows(*args, **options, dtype=torch.float32)
        got = Rows(values.to(FP8), scale)
    else:
        total, got = launch_rows(*args, **options)
    want_total, want = add_norm_rows_ref(*args, **options)
    assert (total.float() - want_total.float()).abs().max() <= TOLERANCE[
        dtype
    ] * want_total.float().abs().max()
    torch.testing.assert_close(got.scale, want.scale, rtol=TOLERANCE[torch.float32], atol=0)
    ours, theirs = got.values.float(), want.values.float()
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
@pytest.mark.parametrize("case", [*CASES, (1, 3, 720, 5120, {"update", "gate"})])
def test_rows_equal_reference(case, dtype):
    compare_rows(case, dtype, "cuda")


@pytest.mark.gpu
def test_rows_compile_into_one_graph():
    args, options = make(CASES[1], torch.float32, "cuda")
    options.pop("normed_dtype")
    options.pop("ahead", None)
    _, got = torch.compile(lambda *a: add_norm_rows(*a, **options), fullgraph=True)(*args)
    want = add_norm_rows_ref(*args, **options)[1]
    torch.testing.assert_close(got.dequantise(), want.dequantise(), rtol=STEP, atol=1e-3)


def test_rows_are_quantised_from_unrounded_numbers():
    args, options = make(CASES[0], torch.bfloat16, "cpu")
    options["normed_dtype"] = torch.float32
    exact = add_norm_ref(*args, **options)[1]
    options.pop("normed_dtype")
    options.pop("ahead", None)
    total, rows = add_norm_rows(*args, **options)
    assert total.dtype == torch.bfloat16
    torch.testing.assert_close(rows.scale, exact.abs().amax(-1, keepdim=True) / 448, rtol=1e-6, atol=0)


def test_a_broken_token_breaks_its_own_row_only():
    args, options = make(CASES[0], torch.float32, "cpu")
    options.pop("normed_dtype")
    options.pop("ahead", None)
    args[0][0, 5, 7] = torch.nan
    rows = add_norm_rows(*args, **options)[1]
    assert rows.scale.isnan().flatten().nonzero().flatten().tolist() == [5]


@pytest.mark.gpu
def test_kernel_compiles_into_one_graph():
    args, options = make(CASES[1], torch.float32, "cuda")
    compiled = torch.compile(lambda *a: add_norm(*a, **options), fullgraph=True)
    for got, want in zip(compiled(*args), add_norm_ref(*args, **options), strict=True):
        torch.testing.assert_close(got, want)


def test_reference_is_layer_norm_of_the_new_residual():
    x, update = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    gate, scale, shift = torch.randn(3, 2, 3, 8)
    total, normed = add_norm_ref(x, update, gate, scale, shift, eps=1e-6)
    norm = torch.nn.LayerNorm(8, eps=1e-6)
    for b in range(2):
        for t in range(6):
            row = x[b, t] + update[b, t] * gate[b, t // 2]
            torch.testing.assert_close(total[b, t], row)
            torch.testing.assert_close(normed[b, t], norm(row) * (1 + scale[b, t // 2]) + shift[b, t // 2])


def test_wrong_shapes_say_what_was_expected():
    x, c = torch.randn(1, 6, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"update: got .*\(1, 6, 4\); expected contiguous .*\(1, 6, 8\)"):
        add_norm(x, torch.randn(1, 6, 4), None, c, c, eps=1e-6)
    with pytest.raises(ValueError, match=r"scale: got shape \(1, 4, 8\).*divide 6 tokens"):
        add_norm(x, None, None, torch.randn(1, 4, 8), torch.randn(1, 4, 8), eps=1e-6)
    with pytest.raises(ValueError, match="gate: got shape"):
        add_norm(x, x, c, c, c, eps=1e-6)
    with pytest.raises(ValueError, match="strides"):
        add_norm(x.transpose(1, 2), None, None, c, c, eps=1e-6)
