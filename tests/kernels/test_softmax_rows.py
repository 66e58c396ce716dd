"""Softmax of rows: kernel against reference, reference against fp64."""

import pytest
import torch

from wanrt_kernels.softmax_rows import LONGEST, SoftmaxConfig, launch, softmax_rows

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a row's largest
SHAPES = [(3, 1), (2, 3, 7), (5, 64), (2, 2, 1000), (3, 2880)]


def compare(shape, dtype, device):
    scores = 30 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(device)
    want = scores.double().softmax(-1)
    got = launch(scores, dtype)
    assert got.dtype is dtype
    assert ((got.double() - want).abs() <= TOLERANCE[dtype] * want.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_is_a_softmax(shape, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [*SHAPES, (2, 6240), (2, 14400), (1, LONGEST)])
def test_kernel_is_a_softmax(shape, dtype):
    compare(shape, dtype, "cuda")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_on_a_cpu_the_reference_serves(dtype):
    scores = torch.randn(3, 5)
    assert torch.equal(softmax_rows(scores, dtype), scores.softmax(-1).to(dtype))


def test_a_row_is_spread_over_threads():
    assert SoftmaxConfig.for_length(6240) == SoftmaxConfig(8192, 8)
    assert SoftmaxConfig.for_length(1) == SoftmaxConfig(1, 1)


@pytest.mark.parametrize("scores", [torch.zeros(3, 4, dtype=torch.float16), torch.zeros(3, 4).t()])
def test_other_scores_are_refused(scores):
    with pytest.raises(ValueError, match="expected contiguous fp32"):
        softmax_rows(scores, torch.float16)
