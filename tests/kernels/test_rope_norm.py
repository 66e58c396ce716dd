"""RMSNorm + rotary positions: kernel against reference, reference against complex numbers."""

import pytest
import torch

from wanrt_kernels.rope_norm import launch, rope_norm, rope_norm_ref

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

CASES = [
    # batch, tokens, heads, head_dim, what is there
    (1, 5, 3, 16, {"norm", "rope"}),
    (2, 4, 2, 20, {"norm", "rope", "out"}),
    (2, 3, 3, 12, {"norm"}),
    (1, 3, 5, 24, {"rope", "strided"}),
    (2, 2, 12, 128, {"norm", "rope", "out", "strided"}),
    (1, 2, 40, 128, {"norm", "rope"}),
    (2, 3, 3, 16, {"norm", "rope", "squares"}),
    (1, 4, 5, 24, {"norm", "squares", "out"}),
]


def make(case, dtype, device):
    batch, tokens, heads, head_dim, options = case
    generator = torch.Generator().manual_seed(tokens * 100 + head_dim)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = heads * head_dim
    x = draw(batch, tokens, 3 * width if "strided" in options else width, dtype=dtype)[..., :width]
    angle = draw(tokens, head_dim // 2)
    rope = "rope" in options
    weight = draw(width, dtype=dtype) if "norm" in options else None
    return x, weight, angle.cos() if rope else None, angle.sin() if rope else None


def compare(case, dtype, device):
    args = make(case, dtype, device)
    batch, tokens, heads, head_dim, options = case
    kwargs = {"head_dim": head_dim, "eps": 1e-6, "mean_squares": None}
    if "squares" in options:  # as they lie in memory that ranks share
        kwargs["mean_squares"] = (torch.rand(3, batch, tokens, device=device) + 0.5).permute(1, 2, 0)
    out = None
    if "out" in options:  # a slice of a longer cache: what lies around it must stay
        cache = torch.full((batch, tokens + 5, heads, head_dim), 7.0, device=device, dtype=dtype)
        out = cache[:, 2 : 2 + tokens]
    want = rope_norm_ref(*args, **kwargs)
    got = launch(*args, **kwargs, out=out)
    assert (got.float() - want.float()).abs().max() <= TOLERANCE[dtype] * want.float().abs().max()
    if out is not None:
        assert got is out
        assert (cache[:, :2] == 7).all()
        assert (cache[:, 2 + tokens :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    compare(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", [*CASES, (1, 2160, 40, 128, {"norm", "rope", "out"})])
def test_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cuda")


@pytest.mark.gpu
def test_kernel_compiles_into_one_graph():
    args = make(CASES[0], torch.float32, "cuda")
    compiled = torch.compile(lambda *a: rope_norm(*a, head_dim=16, eps=1e-6), fullgraph=True)
    torch.testing.assert_close(compiled(*args), rope_norm_ref(*args, head_dim=16, eps=1e-6))


def test_reference_equals_complex_numbers():
    x, weight, cos, sin = make((2, 5, 3, 16, {"norm", "rope"}), torch.float32, "cpu")
    normed = torch.nn.functional.rms_norm(x, (48,), weight, 1e-6).reshape(2, 5, 3, 8, 2)
    turned = torch.view_as_complex(normed) * torch.complex(cos, sin)[:, None]
    got = rope_norm_ref(x, weight, cos, sin, head_dim=16, eps=1e-6)
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2))


def test_parts_with_the_squares_of_all_equal_the_whole():
    """What tensor parallelism does: heads apart, with the mean squares of all."""
    x, weight, cos, sin = make((2, 5, 4, 16, {"norm", "rope"}), torch.float32, "cpu")
    squares = torch.stack([part.square().mean(-1) for part in x.chunk(2, dim=-1)], dim=-1)
    parts = [
        rope_norm(x[..., part], weight[part], cos, sin, head_dim=16, eps=1e-6, mean_squares=squares)
        for part in (slice(0, 32), slice(32, 64))
    ]
    whole = rope_norm(x, weight, cos, sin, head_dim=16, eps=1e-6)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


def test_wrong_shapes_say_what_was_expected():
    x, weight, cos, sin = make((1, 5, 3, 16, {"norm", "rope"}), torch.float32, "cpu")
    kwargs = {"head_dim": 16, "eps": 1e-6}
    with pytest.raises(ValueError, match=r"cos: got shape \(4, 8\); expected contiguous \[5, 8\]"):
        rope_norm(x, weight, cos[:4], sin, **kwargs)
    with pytest.raises(ValueError, match="expected both or neither"):
        rope_norm(x, weight, cos, None, **kwargs)
    with pytest.raises(ValueError, match="multiple of the even head_dim 10"):
        rope_norm(x, weight, None, None, head_dim=10, eps=1e-6)
    with pytest.raises(ValueError, match=r"mean_squares: got shape \(1, 5\); expected \[1, 5, parts\]"):
        rope_norm(x, weight, cos, sin, mean_squares=torch.ones(1, 5), **kwargs)
    with pytest.raises(ValueError, match=r"out: got shape \(1, 5, 16, 3\)"):
        rope_norm(x, weight, cos, sin, out=torch.empty(1, 5, 16, 3), **kwargs)
