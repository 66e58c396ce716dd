"""Mean squares stored on every rank: each rank's kernel, in one process, against reference."""

import pytest
import torch

from tests.kernels.ranks import among
from wanrt_kernels.shared_mean_squares import mean_squares_ref, store_mean_squares

TOLERANCE = 2e-6  # the sum is fp32 whatever is summed

CASES = [
    # ranks, batch, tokens, channels of a rank, projections, what is there
    (2, 1, 5, 48, 2, set()),
    (3, 2, 3, 33, 1, {"strided"}),
    (8, 1, 17, 640, 2, {"strided"}),
    (4, 1, 9, 1280, 1, set()),
    (2, 1, 3, 2560, 2, {"strided"}),
    (2, 1, 1, 5120, 1, set()),
]
LARGE = (2, 1, 2160, 2560, 2, {"strided"})


def make(case, dtype, device):
    """Projections of every rank: [N][P]."""
    ranks, batch, tokens, channels, count, options = case
    generator = torch.Generator().manual_seed(channels)
    strided = "strided" in options  # parts of one joined projection

    def draw():
        x = torch.randn(batch, tokens, 3 * channels, generator=generator).to(device, dtype)
        parts = x.chunk(3, dim=-1)[:count]
        return parts if strided else [part.contiguous() for part in parts]

    return [draw() for _ in range(ranks)]


def compare(case, dtype, device):
    ranks, batch, tokens, _, count, _ = case
    projections = make(case, dtype, device)
    outs = [torch.full((ranks, count, batch, tokens), torch.nan, device=device) for _ in range(ranks)]
    for rank, parts in enumerate(projections):
        store_mean_squares(parts, among(outs, rank), rank=rank)
    want = torch.stack([mean_squares_ref(parts) for parts in projections])
    for out in outs:
        torch.testing.assert_close(out, want, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, LARGE])
def test_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cuda")


def test_wrong_shapes_say_what_was_expected():
    x = torch.randn(1, 5, 8)
    out = among([torch.zeros(2, 1, 1, 5)] * 2, 0)
    with pytest.raises(ValueError, match=r"out: got .*\(2, 1, 1, 5\).*; expected .*\(2, 2, 1, 5\)"):
        store_mean_squares((x, x), out, rank=0)
    with pytest.raises(ValueError, match="expected one or two of the same"):
        store_mean_squares((x, x[:, :4]), out, rank=0)
    with pytest.raises(ValueError, match="expected one or two of the same"):
        store_mean_squares((x.transpose(1, 2),), out, rank=0)
    with pytest.raises(ValueError, match="rank: got 2; expected one of 2"):
        store_mean_squares((x,), out, rank=2)
