"""RGB to NV12 (BT.709, limited range) in one pass: Triton kernel, plain PyTorch reference, checked wrapper.

NV12 is what video encoders eat: a full-size plane of luma and below it a half-height plane of interleaved
Cb, Cr, so a frame of H x W pixels is a [H * 3 / 2, W] array of bytes, 1.5 bytes a pixel instead of RGB's 3.

Formulas: ITU-R BT.709-6, section 3 (Kr = 0.2126, Kb = 0.0722; 8-bit limited range: luma 16..235, chroma
16..240 around 128). Chroma is left-sited (ITU-T H.264 annex E, chroma_sample_loc_type 0, what decoders
assume when nothing is said): horizontally the weights 1/4, 1/2, 1/4 centred on each even column, vertically
the mean of two rows; the left edge repeats its first column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

try:  # CPU wheels of torch come without Triton; the reference below needs none
    import triton
    import triton.language as tl
except ImportError:
    triton = None  # type: ignore[assignment]

KR, KB = 0.2126, 0.0722
KG = 1.0 - KR - KB
LUMA_SCALE = 219.0 / 255.0
CB_SCALE = 224.0 / 255.0 / (2.0 * (1.0 - KB))
CR_SCALE = 224.0 / 255.0 / (2.0 * (1.0 - KR))

Backend = Literal["auto", "triton", "torch"]


@dataclass(frozen=True)
class Launch:
    """How the kernel is cut: one program makes `block` chroma samples of one chroma row (2 x 2 block luma
    samples)."""

    block: int
    num_warps: int

    @classmethod
    def for_width(cls, width: int) -> Launch:
        """Few wide programs: the kernel only moves bytes, 256 chroma columns are 512 contiguous bytes of
        luma."""
        block = 64 if width <= 128 else 128 if width <= 256 else 256
        return cls(block=block, num_warps=block // 64)


def nv12_ref(pixels: Tensor) -> Tensor:
    """Plain PyTorch reference of `rgb_to_nv12`, in fp32; same shapes, ranges and rounding."""
    red, green, blue = _levels(pixels).unbind(-1)
    luma = KR * red + KG * green + KB * blue
    cb, cr = (_subsample(c) for c in (CB_SCALE * (blue - luma), CR_SCALE * (red - luma)))
    chroma = torch.stack((cb, cr), dim=-1).flatten(-2)
    return torch.cat((_to_byte(LUMA_SCALE * luma + 16.0), _to_byte(chroma + 128.0)), dim=-2)


def _levels(pixels: Tensor) -> Tensor:
    """uint8 or float [-1, 1] to fp32 levels in 0..255."""
    if pixels.dtype == torch.uint8:
        return pixels.float()
    return ((pixels.float() + 1.0) * 127.5).clamp(0.0, 255.0)


def _subsample(plane: Tensor) -> Tensor:
    """[T, H, W] to [T, H/2, W/2]: 1/4, 1/2, 1/4 around even columns, mean of two rows."""
    rows = (plane[:, 0::2] + plane[:, 1::2]) * 0.5
    even, odd = rows[..., 0::2], rows[..., 1::2]
    left = torch.cat((even[..., :1], odd[..., :-1]), dim=-1)
    return 0.5 * even + 0.25 * (left + odd)


def _to_byte(values: Tensor) -> Tensor:
    """Round half up; the values are never negative."""
    return (values + 0.5).floor().to(torch.uint8)


if triton is not None:

    @triton.jit
    def _level(values, is_float: tl.constexpr):
        values = values.to(tl.float32)
        if is_float:
            values = tl.minimum(tl.maximum((values + 1.0) * 127.5, 0.0), 255.0)
        return values

    @triton.jit
    def _ycc(base, column, stride_w, stride_c, mask, is_float: tl.constexpr):
        """Luma (0..255 levels) and unscaled colour differences of one row at the given columns."""
        at = base + column * stride_w
        red = _level(tl.load(at, mask=mask, other=0), is_float)
        green = _level(tl.load(at + stride_c, mask=mask, other=0), is_float)
        blue = _level(tl.load(at + 2 * stride_c, mask=mask, other=0), is_float)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        return luma, blue - luma, red - luma

    @triton.jit
    def _nv12_kernel(
        source,
        target,
        height,
        width,
        stride_t,
        stride_h,
        stride_w,
        stride_c,
        luma_scale: tl.constexpr,
        cb_scale: tl.constexpr,
        cr_scale: tl.constexpr,
        is_float: tl.constexpr,
        block: tl.constexpr,
    ):
        half_rows = height // 2
        frame = (tl.program_id(0) // half_rows).to(tl.int64)
        row = tl.program_id(0) % half_rows
        column = tl.program_id(1) * block + tl.arange(0, block)
        mask = column < width // 2
        before = tl.maximum(2 * column - 1, 0)
        upper = source + frame * stride_t + (2 * row).to(tl.int64) * stride_h
        lower = upper + stride_h

        y00, b00, r00 = _ycc(upper, 2 * column, stride_w, stride_c, mask, is_float)
        y01, b01, r01 = _ycc(upper, 2 * column + 1, stride_w, stride_c, mask, is_float)
        y10, b10, r10 = _ycc(lower, 2 * column, stride_w, stride_c, mask, is_float)
        y11, b11, r11 = _ycc(lower, 2 * column + 1, stride_w, stride_c, mask, is_float)
        _, b0, r0 = _ycc(upper, before, stride_w, stride_c, mask, is_float)
        _, b1, r1 = _ycc(lower, before, stride_w, stride_c, mask, is_float)
        cb = cb_scale * (0.25 * (b00 + b10) + 0.125 * (b0 + b1 + b01 + b11)) + 128.0
        cr = cr_scale * (0.25 * (r00 + r10) + 0.125 * (r0 + r1 + r01 + r11)) + 128.0

        plane = target + frame * (height * 3 // 2) * width
        wide = 2 * tl.program_id(1) * block + tl.arange(0, 2 * block)
        inside = wide < width
        for_row = plane + 2 * row * width + wide
        luma_upper = tl.interleave(y00, y01) * luma_scale + 16.5
        luma_lower = tl.interleave(y10, y11) * luma_scale + 16.5
        tl.store(for_row, tl.floor(luma_upper).to(tl.uint8), mask=inside)
        tl.store(for_row + width, tl.floor(luma_lower).to(tl.uint8), mask=inside)
        chroma = tl.floor(tl.interleave(cb, cr) + 0.5).to(tl.uint8)
        tl.store(plane + (height + row) * width + wide, chroma, mask=inside)


def rgb_to_nv12(pixels: Tensor, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Convert RGB frames to NV12, BT.709 limited range.

    Args:
        pixels: [T, H, W, 3], any strides; uint8 in 0..255, or floating in [-1, 1] (values outside are
        clamped), so that
            a decoder's [3, T, H, W] enters as `x.permute(1, 2, 3, 0)` without a copy. H and W even.
        out: optional contiguous uint8 [T, H * 3 // 2, W] on the same device.
        backend: "triton", "torch", or "auto": the kernel for CUDA tensors, the reference elsewhere.

    Returns:
        uint8 [T, H * 3 // 2, W]: rows 0..H-1 luma, below them Cb, Cr interleaved.

    Raises:
        ValueError: for another shape, dtype or an odd size, or a backend that is not installed.
    """
    shape = _checked_shape(pixels)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=pixels.device)
    elif out.shape != shape or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(
            f"rgb_to_nv12: out is {out.dtype} {list(out.shape)}, expected contiguous uint8 {list(shape)}"
        )
    if _use_triton(backend, pixels):
        _launch(pixels, out)
        return out
    return out.copy_(nv12_ref(pixels))


def _checked_shape(pixels: Tensor) -> torch.Size:
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"rgb_to_nv12: got shape {list(pixels.shape)}, expected [T, H, W, 3]")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"rgb_to_nv12: got {pixels.dtype}, expected uint8 (0..255) or floating ([-1, 1])")
    frames, height, width, _ = pixels.shape
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(
            f"rgb_to_nv12: got {width}x{height}, expected an even width and height (4:2:0 chroma)"
        )
    return torch.Size((frames, height * 3 // 2, width))


def _use_triton(backend: Backend, pixels: Tensor) -> bool:
    if backend == "auto":
        return pixels.is_cuda and triton is not None
    if backend == "triton" and triton is None:
        raise ValueError("rgb_to_nv12: backend 'triton' asked for, but Triton is not installed; use 'torch'")
    return backend == "triton"


def _launch(pixels: Tensor, out: Tensor) -> None:
    frames, height, width, _ = pixels.shape
    if not frames:
        return
    launch = Launch.for_width(width)
    grid: tuple[Any, ...] = (frames * (height // 2), triton.cdiv(width // 2, launch.block))
    _nv12_kernel[grid](
        pixels,
        out,
        height,
        width,
        *pixels.stride(),
        luma_scale=LUMA_SCALE,
        cb_scale=CB_SCALE,
        cr_scale=CR_SCALE,
        is_float=pixels.is_floating_point(),
        block=launch.block,
        num_warps=launch.num_warps,
    )
