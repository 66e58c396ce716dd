"""RMSNorm over all heads, then rotary positions, of queries or keys in one pass, written where they are needed.

Wan normalises q and k over the full width before it splits heads, then turns consecutive pairs of every head by the
token's angles (Wan-Video/Wan2.1 `wan/modules/model.py`, commit 9737cba, `WanSelfAttention`). The kernel reads the
projection once and writes the result once, into a key cache if asked to; arithmetic is fp32, tables are fp32, no
complex numbers.

Shapes: B batch, T tokens, H heads, D head_dim, C = H * D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.adaln import needs_gradient

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton; `rope_norm_ref` serves there
    triton = None


@dataclass(frozen=True)
class RopeNormConfig:
    """Launch shape: `block` channels (a power of two, one token a program) and warps."""

    block: int
    warps: int

    @classmethod
    def for_channels(cls, channels: int) -> RopeNormConfig:
        """A token stays in registers: 64 values per thread at 8192, the padded 14B width.

        H100, 2160 tokens of 5120: four warps take 17 us, eight 18.
        """
        block = 1 << (channels - 1).bit_length()
        return cls(block=block, warps=max(1, min(4, block // 512)))


def rope_norm_ref(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    out: Tensor | None = None,
    mean_squares: Tensor | None = None,
) -> Tensor:
    """Compute what `rope_norm` computes, in plain PyTorch; differentiable without `out`."""
    y = x.float()
    if weight is not None:
        if mean_squares is None:
            mean_squares = y.square().mean(-1, keepdim=True)
        y = y * torch.rsqrt(mean_squares.mean(-1, keepdim=True) + eps) * weight.float()
    y = y.unflatten(-1, (-1, head_dim))
    if cos is not None and sin is not None:
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        y = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return y.to(x.dtype) if out is None else out.copy_(y)


if triton is not None:

    @triton.jit
    def turned_row(
        x_ptr, weight_ptr, cos_ptr, sin_ptr, place, squares,
        EPS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
        NORM: tl.constexpr, ROPE: tl.constexpr,
    ):  # fmt: skip
        """One token, normalised and turned by row `place` of the tables, fp32 [BLOCK].

        squares: the mean of its squares; None: found here.
        """
        channel = tl.arange(0, BLOCK)
        mask = channel < C
        y = tl.load(x_ptr + channel, mask, 0.0).to(tl.float32)
        if NORM:
            weight = tl.load(weight_ptr + channel, mask, 0.0).to(tl.float32)
            if squares is None:
                squares = tl.sum(y * y, axis=0) / C
            y = y * tl.rsqrt(squares + EPS) * weight
        if ROPE:
            pair = tl.arange(0, BLOCK // 2)
            turn = place * (D // 2) + pair % (D // 2)
            cos = tl.load(cos_ptr + turn, pair < C // 2, 0.0)
            sin = tl.load(sin_ptr + turn, pair < C // 2, 0.0)
            even, odd = tl.split(tl.reshape(y, (BLOCK // 2, 2)))
            y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
        return y

    @triton.jit
    def _rope_norm_kernel(
        x_ptr, weight_ptr, squares_ptr, cos_ptr, sin_ptr, out_ptr,
        tokens, x_batch, x_token, squares_batch, squares_token, squares_part, out_batch, out_token,
        EPS: tl.constexpr,  # as an argument, torch.compile would make it, and all that meets it, fp64
        C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
        PARTS: tl.constexpr,  # of a token's channels, whose mean squares are given; 0: x has all channels
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        batch, token = row // tokens, row % tokens
        channel = tl.arange(0, BLOCK)
        x_ptr += batch * x_batch + token * x_token
        if PARTS:
            squares_ptr += batch * squares_batch + token * squares_token
            squares = tl.load(squares_ptr)
            for part in tl.static_range(1, PARTS):
                squares += tl.load(squares_ptr + part * squares_part)
            squares /= PARTS
        else:
            squares: tl.constexpr = None
        y = turned_row(x_ptr, weight_ptr, cos_ptr, sin_ptr, token, squares, EPS, C, D, BLOCK, NORM, ROPE)
        out_ptr += batch * out_batch + token * out_token
        tl.store(out_ptr + channel, y.to(out_ptr.dtype.element_ty), channel < C)


def rope_norm(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    out: Tensor | None = None,
    mean_squares: Tensor | None = None,
) -> Tensor:
    """`rotate(x / rms(x) * weight)`, head by head.

    Triton on CUDA; `rope_norm_ref` elsewhere, and wherever a gradient is wanted.

    Args:
        x: [B, T, C], channels contiguous.
        weight: [C] of the RMSNorm over all channels; None: no norm.
        cos, sin: [T, D/2] fp32, contiguous, of these tokens; None: no rotation.
        head_dim: D, even, divides C.
        eps: of the RMSNorm.
        out: where to write, [B, T, H, D] with contiguous heads, for example a slice of a key cache; None: a new
            tensor in x's dtype.
        mean_squares: [B, T, N] fp32, any strides: for callers that hold only a part of a token's channels, the mean
            of squares of each of its N parts of equal size; None: computed from `x`.

    Returns:
        [B, T, H, D]: `out`, or the new tensor.

    Raises:
        ValueError: shapes or layout that do not fit, each with what was got and expected.
    """
    _check(x, weight, cos, sin, head_dim, out, mean_squares)
    if x.is_cuda and triton is not None and not needs_gradient(x, weight):
        return launch(x, weight, cos, sin, head_dim=head_dim, eps=eps, out=out, mean_squares=mean_squares)
    return rope_norm_ref(x, weight, cos, sin, head_dim=head_dim, eps=eps, out=out, mean_squares=mean_squares)


def launch(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    out: Tensor | None,
    mean_squares: Tensor | None,
) -> Tensor:
    """Launch the Triton kernel; arguments as for `rope_norm`, which has checked them."""
    batch, tokens, channels = x.shape
    if out is None:
        out = x.new_empty(batch, tokens, channels // head_dim, head_dim)
    config = RopeNormConfig.for_channels(channels)
    _rope_norm_kernel[(batch * tokens,)](
        x, weight, mean_squares, cos, sin, out,
        tokens, *x.stride()[:2], *((0, 0, 0) if mean_squares is None else mean_squares.stride()), *out.stride()[:2],
        EPS=eps, C=channels, D=head_dim, BLOCK=config.block, NORM=weight is not None, ROPE=cos is not None,
        PARTS=0 if mean_squares is None else mean_squares.shape[2],
        num_warps=config.warps,
    )  # fmt: skip
    return out


def _check(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    out: Tensor | None,
    mean_squares: Tensor | None,
) -> None:
    if x.dim() != 3 or x.stride(2) != 1 or head_dim % 2 or x.shape[2] % head_dim:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected [B, T, C] with contiguous channels, "
            f"C a multiple of the even head_dim {head_dim}"
        )
    batch, tokens, channels = x.shape
    expected = {
        "weight": (weight, (channels,)),
        "cos": (cos, (tokens, head_dim // 2)),
        "sin": (sin, (tokens, head_dim // 2)),
    }
    for name, (values, shape) in expected.items():
        if values is not None and (tuple(values.shape) != shape or not values.is_contiguous()):
            raise ValueError(f"{name}: got shape {tuple(values.shape)}; expected contiguous {list(shape)}")
    if mean_squares is not None and (mean_squares.dim() != 3 or mean_squares.shape[:2] != x.shape[:2]):
        raise ValueError(
            f"mean_squares: got shape {tuple(mean_squares.shape)}; expected [{batch}, {tokens}, parts]"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: got one of them; expected both or neither")
    _check_out(out, (batch, tokens, channels // head_dim, head_dim))


def _check_out(out: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    if out is not None and (tuple(out.shape) != shape or out.stride()[2:] != (shape[3], 1)):
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, strides {out.stride()}; expected {list(shape)}, contiguous heads"
        )
