"""Tokens to heads and back through other ranks' memory: kernels against references, all ranks in one process."""

import pytest
import torch

from wanrt_kernels.peer_heads import (
    OwnTokens,
    scatter_heads,
    scatter_heads_ref,
    scatter_tokens,
    scatter_tokens_ref,
)

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

CASES = [
    # ranks, frames, tokens of a frame and rank, heads of a rank, head_dim, first, turn
    (2, 3, 4, 2, 16, 0, 0),
    (2, 3, 2, 1, 12, 2, 1),
    (4, 2, 3, 1, 20, 1, 1),
    (5, 1, 2, 3, 8, 0, 0),
    (2, 3, 3, 20, 128, 3, 0),
]


def make(case, dtype, device):
    ranks, frames, own, heads, head_dim, first, _ = case
    generator = torch.Generator().manual_seed(frames * 100 + head_dim)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    width = ranks * heads * head_dim
    x = draw(ranks, 1, frames * own, 3 * width).to(dtype)[
        ..., width : 2 * width
    ]  # as q, k, v from one product
    angle = draw(frames * ranks * own, head_dim // 2)
    buffers = [
        torch.full(((first + frames + 1) * ranks * own, heads, head_dim), 7.0, device=device, dtype=dtype)
        for _ in range(ranks)
    ]
    return x, draw(width).to(dtype), angle.cos(), angle.sin(), buffers


def addresses(buffers):
    return torch.tensor([buffer.data_ptr() for buffer in buffers], device=buffers[0].device)


def check_heads(case, dtype, device, *, norm, rope):
    ranks, frames, own, _, head_dim, first, turn = case
    x, weight, cos, sin, want = make(case, dtype, device)
    got = [buffer.clone() for buffer in want]
    where = addresses(got)
    tables = (cos, sin) if rope else (None, None)
    for rank in range(ranks):
        share = OwnTokens(rank, ranks, frames, own, first, turn)
        arguments = (x[rank], weight if norm else None, *tables)
        scatter_heads(*arguments, where, share, head_dim=head_dim, eps=1e-6)
        scatter_heads_ref(*arguments, want, share, head_dim=head_dim, eps=1e-6)
    scale = max(buffer.abs().max().item() for buffer in want)
    for made, wanted in zip(got, want, strict=True):
        untouched = wanted == 7
        assert (made.float() - wanted.float()).abs().max() <= TOLERANCE[dtype] * scale
        assert untouched.any()
        assert (made[untouched] == 7).all()


def check_tokens(case, dtype, device):
    ranks, frames, own, heads, head_dim, *_ = case
    tokens = frames * ranks * own
    x = torch.randn(ranks, heads, tokens, head_dim, device=device).to(dtype).transpose(1, 2)
    want = [torch.full((frames * own, ranks * heads, head_dim), 7.0, device=device, dtype=dtype) for _ in x]
    got = [buffer.clone() for buffer in want]
    for rank in range(ranks):
        share = OwnTokens(rank, ranks, frames, own)
        scatter_tokens(x[rank], addresses(got), share)
        scatter_tokens_ref(x[rank], want, share)
    assert all(torch.equal(made, wanted) for made, wanted in zip(got, want, strict=True))
    # every token's heads, rank after rank
    together = torch.cat(list(x), dim=1).unflatten(0, (frames, ranks, own))
    assert torch.equal(torch.stack(got), together.transpose(0, 1).flatten(1, 2))


@pytest.mark.parametrize(("norm", "rope"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
def test_interpreted_heads_equal_reference(case, dtype, norm, rope):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_heads(case, dtype, "cpu", norm=norm, rope=rope)


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "rope"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", CASES)
def test_heads_equal_reference(case, dtype, norm, rope):
    check_heads(case, dtype, "cuda", norm=norm, rope=rope)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
def test_interpreted_tokens_equal_reference(case):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_tokens(case, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_reference(case, dtype):
    check_tokens(case, dtype, "cuda")


def test_slots_are_a_rotation_of_frames():
    assert OwnTokens(1, 2, 3, 2, first=4, turn=1).slots().tolist() == [26, 27, 18, 19, 22, 23]
    assert OwnTokens(1, 2, 2, 1).rows().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 8)}, "expected \\[1, 4, C\\]"),
        ({"x": torch.zeros(1, 4, 12)}, "heads of the even 4 for each of 2"),
        ({"weight": torch.ones(4)}, "weight: got"),
        ({"cos": None}, "expected both or neither"),
        ({"addresses": torch.zeros(3, dtype=torch.int64)}, "expected int64 \\[2\\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    tables = torch.ones(8, 2)
    given = {"x": torch.zeros(1, 4, 8), "weight": torch.ones(8), "cos": tables, "sin": tables}
    given |= {"addresses": torch.zeros(2, dtype=torch.int64)} | change
    if change.get("x") is not None:
        given["weight"] = torch.ones(given["x"].shape[2])
    with pytest.raises(ValueError, match=message):
        scatter_heads(*given.values(), OwnTokens(0, 2, 2, 2), head_dim=4, eps=1e-6)


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected 8 tokens"):
        scatter_tokens(torch.zeros(6, 2, 4), torch.zeros(2, dtype=torch.int64), OwnTokens(0, 2, 2, 2))
