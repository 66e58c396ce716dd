"""Quantised rows: kernel against reference, reference against the definition, and rows that would break one."""

import pytest
import torch

from wanrt_kernels.quant_rows import FP8, FP8_MAX, Rows, launch, quantise_rows, quantise_rows_ref

SHAPES = [(1, 16), (3, 33), (2, 5, 40), (7, 1536), (2, 13824), (0, 32), (1, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(shape[-1])
    rows = torch.randn(shape, generator=generator)
    sizes = torch.logspace(-3, 3, shape[-2]) if shape[-2] else torch.ones(0)
    return (rows * sizes.unsqueeze(1)).to(device, dtype)


def awkward(device="cpu"):
    """Rows of zeros, numbers near the ends of fp32, NaN, Inf."""
    rows = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    rows[0] = 0
    rows[1] *= 1e-38
    rows[2] *= 1e37
    rows[3, 7] = torch.nan
    rows[4, 0] = torch.inf
    rows[5, 47] = -torch.inf
    rows[6] = 0
    rows[6, 3] = torch.nan
    rows[7] = -448.0
    rows[8] = 1e-44  # subnormal
    return rows.to(device)


def assert_same(got: Rows, want: Rows):
    assert got.values.dtype == want.values.dtype == FP8
    assert got.values.shape == want.values.shape
    assert got.scale.shape == want.scale.shape
    torch.testing.assert_close(got.scale, want.scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))


def interpreted(x):
    """Triton's interpreter loses the carry from mantissa to exponent when it rounds to fp8, so torch rounds."""
    values, scale = launch(x, torch.float32)
    return Rows(values.to(FP8), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(shape, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    x = draw(shape, dtype)
    assert_same(interpreted(x), quantise_rows_ref(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_keeps_awkward_rows():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_same(interpreted(awkward()), quantise_rows_ref(awkward()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2160, 5120)])
def test_kernel_equals_reference(shape, dtype):
    x = draw(shape, dtype, "cuda")
    assert_same(launch(x), quantise_rows_ref(x))


@pytest.mark.gpu
def test_kernel_keeps_awkward_rows():
    assert_same(launch(awkward("cuda")), quantise_rows_ref(awkward("cuda")))


@pytest.mark.gpu
def test_kernel_compiles_into_one_graph():
    x = draw((4, 48), torch.bfloat16, "cuda")
    assert_same(torch.compile(quantise_rows, fullgraph=True)(x), quantise_rows_ref(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_nearest_number_of_e4m3(dtype):
    x = draw((6, 200), dtype)
    got = quantise_rows_ref(x)
    torch.testing.assert_close(got.scale, x.float().abs().amax(-1, keepdim=True) / FP8_MAX)
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    every = every[every.isfinite()]
    nearest = (x.float() / got.scale).unsqueeze(-1).sub(every).abs().amin(-1)
    off = (got.values.float() - x.float() / got.scale).abs()
    assert (off <= nearest * (1 + 1e-5) + 1e-5).all()


def test_awkward_rows_stay_themselves():
    x = awkward()
    got = quantise_rows_ref(x)
    back = got.dequantise()
    assert torch.equal(back[0], x[0])
    assert back[[3, 4, 5, 6]].isnan().all(), "NaN and Inf must show in every product of the row"
    assert back[[0, 1, 2, 7, 8]].isfinite().all()
    assert got.values.float().isfinite().all()
    torch.testing.assert_close(back[2], x[2], rtol=2**-4, atol=1e37 * 2**-6)
    assert torch.equal(back[7], x[7])


def test_a_layout_that_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"x: got shape \(5, 4\), strides \(1, 5\); expected contiguous rows"
    ):
        quantise_rows(torch.zeros(4, 5).T)
