import pytest
import torch

from wanrt.errors import UsageError
from wanrt.pipeline.conditioning import Curve, blend, lerp, mix, slerp


def oracle_slerp(a, b, fraction):
    """Rotation in the plane of the two vectors (Gram-Schmidt), lengths moved linearly; float64, one token."""
    a, b = a.double(), b.double()
    e1 = a / a.norm()
    e2 = b / b.norm() - (b / b.norm()).dot(e1) * e1
    angle = torch.atan2(e2.norm(), (b / b.norm()).dot(e1))
    e2 = e2 / e2.norm()
    direction = torch.cos(fraction * angle) * e1 + torch.sin(fraction * angle) * e2
    return direction * ((1 - fraction) * a.norm() + fraction * b.norm())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_slerp_against_a_rotation(fraction):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 5, 8, generator=generator)
    got = slerp(a, 3 * b, fraction)
    want = torch.stack([oracle_slerp(x, 3 * y, fraction) for x, y in zip(a[0], b[0], strict=True)])[None]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("curve", list(Curve))
def test_ends_are_exact(curve):
    a, b = torch.randn(2, 1, 5, 8)
    assert torch.equal(mix(a, b, 0.0, curve), a)
    assert torch.equal(mix(a, b, 1.0, curve), b)


def test_padding_and_parallel_tokens_blend_linearly():
    a, b = torch.randn(2, 1, 3, 8)
    a[:, 1:] = 0
    b[:, 2] = 0
    got = slerp(a, b, 0.25)
    torch.testing.assert_close(got[:, 1:], lerp(a, b, 0.25)[:, 1:])
    assert torch.isfinite(got).all()
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)
    torch.testing.assert_close(slerp(b, -b, 0.5), torch.zeros_like(b))


def test_weighted_blend():
    embeddings = list(torch.randn(3, 1, 5, 8))
    got = blend(embeddings, (1.0, 3.0, 4.0))
    want = (embeddings[0] + 3 * embeddings[1] + 4 * embeddings[2]) / 8
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(blend(embeddings[:2], (0.7, 0.3), "slerp"), slerp(*embeddings[:2], 0.3))
    assert torch.equal(blend(embeddings[:2], (0.0, 1.0)), embeddings[1])
    assert torch.equal(blend(embeddings[:1], (0.2,)), embeddings[0])


@pytest.mark.parametrize("weights", [(1.0,), (-1.0, 2.0), (0.0, 0.0)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UsageError, match="weight"):
        blend(list(torch.randn(2, 1, 5, 8)), weights)
