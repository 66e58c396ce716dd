"""GELU with quantisation: kernel against reference, reference against torch's own GELU."""

import pytest
import torch
import torch.nn.functional as F

from wanrt_kernels.gelu_rows import gelu_rows, gelu_rows_ref, launch
from wanrt_kernels.quant_rows import FP8, Rows, quantise_rows_ref

SHAPES = [(1, 16), (3, 33), (2, 5, 80), (2, 13824), (0, 32)]
SCALE_TOLERANCE = 2e-6  # of the scale: two ways to compute tanh
# One step of e4m3 between neighbours, for numbers that the two ways put on either side of a tie; and how rare it is.
STEP, RARE = 2.0**-3, 2e-3


def draw(shape, dtype=torch.float32, device="cpu"):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))).to(device, dtype)


def run(x):
    """The kernel; torch rounds where the kernel is interpreted, as in test_quant_rows."""
    if x.is_cuda:
        return launch(x)
    values, scale = launch(x, torch.float32)
    return Rows(values.to(FP8), scale)


def compare(shape, dtype, device):
    x = draw(shape, dtype, device)
    got, want = run(x), gelu_rows_ref(x)
    assert got.values.dtype == FP8
    assert got.values.shape == x.shape
    torch.testing.assert_close(got.scale, want.scale, rtol=SCALE_TOLERANCE, atol=0)
    ours, theirs = got.values.float(), want.values.float()
    assert ((ours - theirs).abs() <= STEP * theirs.abs() + 2.0**-9).all()
    assert (ours != theirs).sum() <= max(1, RARE * ours.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(shape, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2160, 13824)])
def test_kernel_equals_reference(shape, dtype):
    compare(shape, dtype, "cuda")


@pytest.mark.gpu
def test_kernel_compiles_into_one_graph():
    x = draw((4, 48), torch.bfloat16, "cuda")
    got, want = torch.compile(gelu_rows, fullgraph=True)(x), gelu_rows_ref(x)
    torch.testing.assert_close(got.dequantise(), want.dequantise(), rtol=STEP, atol=1e-4)


def awkward(device="cpu"):
    x = draw((4, 32), device=device)
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, -1e30
    return x


def assert_awkward(rows):
    assert rows.scale.isnan().flatten().tolist() == [True, True, False, False]
    assert not rows.values[2].float().any()


def test_awkward_rows_in_the_reference():
    assert_awkward(gelu_rows_ref(awkward()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_awkward_rows_in_the_interpreted_kernel():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_awkward(run(awkward()))


@pytest.mark.gpu
def test_awkward_rows_in_the_kernel():
    assert_awkward(run(awkward("cuda")))


def test_reference_is_gelu_then_quantise():
    x = draw((4, 50))
    want = quantise_rows_ref(F.gelu(x, approximate="tanh"))
    got = gelu_rows_ref(x)
    assert torch.equal(got.dequantise(), want.dequantise())


def test_a_layout_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="expected contiguous rows"):
        gelu_rows(torch.zeros(4, 5).T)
