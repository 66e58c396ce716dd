"""Bias, residual, RMSNorm and SiLU in one pass, written straight into the next causal convolution's input.

The Wan VAE's block is `RMSNorm -> SiLU -> causal 3x3x3 convolution`, twice, plus a skip connection
(Wan-Video/Wan2.1 `wan/modules/vae.py`, commit 9737cba, `ResidualBlock`). Run one latent at a time, such a
convolution reads frames `t-2, t-1, t`, of which the first two may be the stream's past. This kernel makes its
input: it reads the raw output of the previous convolution once, adds what that convolution left undone (bias,
skip), normalises, takes the two older frames of the stream from `state` and leaves the two newest there. Two forms:

- a stack: for every frame the three that its convolution reads, as channels. A 2-D convolution does the rest. Right
  for single frames;
- a window: the two older frames, then the new ones. A 3-D convolution without padding in time does the rest, as
  fast as the 2-D one (H100, cuDNN 9.19, fp16, 4 frames of 576x320, 96 channels: 0.69 and 0.70 ms), and every frame
  is written once instead of three times.

Layout: channels last. T frames, P = H * W pixels, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton; `norm_stack_ref` serves there
    triton = None

Margin = tuple[int, int, int, int]  # rows at the top and the bottom, columns at the left and the right
NO_MARGIN: Margin = (0, 0, 0, 0)
EPS = 1e-12  # torch.nn.functional.normalize's default, which the reference's RMS_norm uses


@dataclass(frozen=True)
class NormStackConfig:
    """Launch shape: `pixels` per program (a power of two) and warps."""

    pixels: int
    warps: int

    @classmethod
    def for_channels(cls, channels: int) -> NormStackConfig:
        """Choose about 4096 values a program: 32 per thread of four warps keep enough loads in flight."""
        padded = 1 << (channels - 1).bit_length()
        return cls(pixels=max(1, min(32, 4096 // padded)), warps=4)


def norm_stack_ref(
    x: Tensor,
    scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    state: Tensor | None = None,
    unshuffle: bool = False,
    margin: Margin = NO_MARGIN,
    silu: bool = True,
    window: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute what `norm_stack` computes, in plain PyTorch (fp32 inside). Same arguments, same results."""
    if unshuffle:
        top, bottom, left, right = margin
        x = _unshuffle_ref(x)
        x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
    total = x.float()
    if bias is not None:
        total = total + bias.float()
    if residual is not None:
        total = total + residual.float()
    y = total
    if scale is not None:
        y = y / y.square().sum(-1, keepdim=True).sqrt().clamp_min(EPS) * scale.float()
        y = torch.nn.functional.silu(y) if silu else y
    y = y.to(x.dtype)
    if state is None:
        return y, total.to(x.dtype)
    frames = torch.cat([state, y])
    state.copy_(frames[-2:])
    if window:
        return frames, total.to(x.dtype)
    return torch.cat([frames[i : i + x.shape[0]] for i in range(3)], dim=-1), total.to(x.dtype)


def _unshuffle_ref(x: Tensor) -> Tensor:
    """[T, h+1, w+1, 4C] of four phases -> [T, 2h, 2w, C]; phase (a, b) of pixel (i, j) at (i+a, j+b)."""
    frames, rows, columns, channels = x.shape
    out = x.new_empty(frames, 2 * (rows - 1), 2 * (columns - 1), channels // 4)
    phases = x.reshape(frames, rows, columns, 4, channels // 4)
    for a in (0, 1):
        for b in (0, 1):
            out[:, a::2, b::2] = phases[:, a : a + rows - 1, b : b + columns - 1, 2 * a + b]
    return out


if triton is not None:

    @triton.jit
    def _norm_stack_kernel(
        x_ptr, bias_ptr, residual_ptr, scale_ptr, state_ptr, out_ptr, total_ptr,
        pixels, width, x_frame, x_width, top, left,
        T: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
        HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr,
        STATE: tl.constexpr, WINDOW: tl.constexpr, KEEP_TOTAL: tl.constexpr, UNSHUFFLE: tl.constexpr,
        WRITE: tl.constexpr, EPS: tl.constexpr,
    ):  # fmt: skip
        pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
        channel = tl.arange(0, BLOCK_C)
        mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
        here = pixel[:, None] * C + channel[None, :]
        source = here
        if UNSHUFFLE:
            row, column = pixel // width + top, pixel % width + left
            slot = (row // 2 + row % 2) * x_width + column // 2 + column % 2
            source = (slot * 4 + (row % 2) * 2 + column % 2)[:, None] * C + channel[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel, channel < C, 0.0).to(tl.float32)
        if NORM:
            scale = tl.load(scale_ptr + channel, channel < C, 0.0).to(tl.float32)
        if STATE:
            oldest = tl.load(state_ptr + here, mask, 0.0)
            older = tl.load(state_ptr + pixels * C + here, mask, 0.0)
            if WINDOW:
                tl.store(out_ptr + here, oldest, mask)
                tl.store(out_ptr + pixels * C + here, older, mask)
        for t in tl.static_range(T):
            total = tl.load(x_ptr + t * x_frame + source, mask, 0.0).to(tl.float32)
            if HAS_BIAS:
                total += bias[None, :]
            if HAS_RESIDUAL:
                total += tl.load(residual_ptr + t * pixels * C + here, mask, 0.0).to(tl.float32)
            if KEEP_TOTAL:
                tl.store(total_ptr + t * pixels * C + here, total.to(total_ptr.dtype.element_ty), mask)
            if WRITE:
                y = total
                if NORM:
                    norm = tl.sqrt(
                        tl.sum(total * total, axis=1)
                    )  # channels past C are 0: every load is masked
                    y = total / tl.maximum(norm, EPS)[:, None] * scale[None, :]
                    if SILU:
                        y = y * tl.sigmoid(y)
                y = y.to(out_ptr.dtype.element_ty)
                if STATE and not WINDOW:
                    stack = out_ptr + (t * pixels + pixel)[:, None] * (3 * C) + channel[None, :]
                    tl.store(stack, oldest, mask)
                    tl.store(stack + C, older, mask)
                    tl.store(stack + 2 * C, y, mask)
                elif WINDOW:
                    tl.store(out_ptr + (t + 2) * pixels * C + here, y, mask)
                else:
                    tl.store(out_ptr + t * pixels * C + here, y, mask)
                if STATE:
                    oldest, older = older, y
        if STATE:
            tl.store(state_ptr + here, oldest, mask)
            tl.store(state_ptr + pixels * C + here, older, mask)


def norm_stack(
    x: Tensor,
    scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    state: Tensor | None = None,
    unshuffle: bool = False,
    margin: Margin = NO_MARGIN,
    silu: bool = True,
    window: bool = False,
    keep_total: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Finish one convolution and prepare the input of the next.

    `total = x + bias + residual`; `y = silu(total / max(|total|, 1e-12) * scale)` norm over channels;
    `y = total` where `scale` is None.

    Args:
        x: [T, H, W, C], contiguous; or, with `unshuffle`, [T, H/2 + 1, W/2 + 1, 4C]: four phases of a
            nearest upsampling that was folded into a 2x2 convolution.
        scale: [C], gamma * sqrt(C); None skips norm and SiLU.
        bias: [C], of the convolution that made `x`.
        residual: [T, H, W, C], contiguous.
        state: [2, H, W, C], the two frames of `y` before this call; overwritten with the two newest.
        unshuffle: see `x`.
        margin: with `unshuffle`, pixels at the edges that are left out: H and W, of all else, are without them.
        silu: apply SiLU after the norm.
        window: with `state`, make a window instead of stacks.
        keep_total: return `total` too (a later skip connection needs it).

    Returns:
        `(y, total)`: with `state` y is [T, H, W, 3C] (frames t-2, t-1, t as channels), or with `window` too
        [T + 2, H, W, C] (the two frames before, then the new ones); else [T, H, W, C]. `total` is [T, H, W, C], or
        None without `keep_total`. Both in x's dtype; arithmetic in fp32.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, each with what was got and expected.
    """
    _check(x, scale, bias, residual, state, unshuffle, margin)
    options = {"bias": bias, "residual": residual, "state": state, "unshuffle": unshuffle, "silu": silu}
    options["margin"] = margin
    options["window"] = window and state is not None
    if x.is_cuda and triton is not None:
        return launch(x, scale, keep_total=keep_total, **options)
    y, total = norm_stack_ref(x, scale, **options)
    return y, total if keep_total else None


def launch(
    x: Tensor,
    scale: Tensor | None,
    *,
    bias: Tensor | None,
    residual: Tensor | None,
    state: Tensor | None,
    unshuffle: bool,
    margin: Margin = NO_MARGIN,
    silu: bool,
    window: bool,
    keep_total: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the Triton kernel; arguments as for `norm_stack`, which has checked them."""
    frames, height, width, channels = _clip_shape(x, unshuffle, margin)
    write = scale is not None or state is not None
    stacked = state is not None and not window
    out = x.new_empty(frames + 2 * window, height, width, channels * (3 if stacked else 1)) if write else x
    total = x.new_empty(frames, height, width, channels) if keep_total or not write else None
    config = NormStackConfig.for_channels(channels)
    pixels = height * width
    _norm_stack_kernel[(triton.cdiv(pixels, config.pixels),)](
        x, bias, residual, scale, state, out, total,
        pixels, width, x.stride(0), x.shape[2], margin[0], margin[2],
        T=frames, C=channels, BLOCK_C=triton.next_power_of_2(channels), BLOCK_P=config.pixels,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, NORM=scale is not None, SILU=silu,
        STATE=state is not None, WINDOW=window, KEEP_TOTAL=total is not None, UNSHUFFLE=unshuffle, WRITE=write, EPS=EPS,
        num_warps=config.warps,
    )  # fmt: skip
    return (out, total) if write else (total, total)  # type: ignore[return-value]


def _clip_shape(x: Tensor, unshuffle: bool, margin: Margin) -> tuple[int, int, int, int]:
    frames, height, width, channels = x.shape
    if not unshuffle:
        return frames, height, width, channels
    top, bottom, left, right = margin
    return frames, 2 * (height - 1) - top - bottom, 2 * (width - 1) - left - right, channels // 4


def _check(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    state: Tensor | None,
    unshuffle: bool,
    margin: Margin,
) -> None:
    if margin != NO_MARGIN and not unshuffle:
        raise ValueError(f"margin: got {margin}, expected {NO_MARGIN} without unshuffle")
    if x.dim() != 4 or not x.is_contiguous():
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected contiguous [T, H, W, C]"
        )
    frames, height, width, channels = _clip_shape(x, unshuffle, margin)
    expected = {
        "scale": (scale, (channels,)),
        "bias": (bias, (channels,)),
        "residual": (residual, (frames, height, width, channels)),
        "state": (state, (2, height, width, channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; expected contiguous {list(shape)}")
    for name, tensor in (("residual", residual), ("state", state)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}; expected {x.dtype}, as x")
