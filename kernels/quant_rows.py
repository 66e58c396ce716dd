"""Rows of numbers as fp8 with one scale a row, for products that take both (`torch._scaled_mm`, rowwise).

A row is a token's activation or an output channel's weights: `x ~ values * scale`, values in e4m3fn, scale =
max|row| / 448, so the row's largest number is e4m3fn's largest. Numbers beyond are cut off, never NaN; a row of zeros
stays zeros; a row with NaN or Inf gets the scale NaN, hence a product of NaN that no one can overlook.

Shapes: R rows (any number of leading axes), K numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton; `quantise_rows_ref` serves there
    triton = None

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest number of e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433, table 1)
TINIEST = (
    2.0**-100
)  # taken for max|row| of rows below it: 448 / TINIEST and TINIEST / 448 are normal fp32 numbers


class Rows(NamedTuple):
    """Quantised rows.

    Attributes:
        values: [..., K] e4m3fn, contiguous.
        scale: [..., 1] fp32, contiguous; `values * scale` is what was quantised.
    """

    values: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        """[..., K] fp32. For tests and references."""
        return self.values.float() * self.scale

    @classmethod
    def empty(cls, like: Tensor, dtype: torch.dtype = FP8) -> Rows:
        """Room for the rows of a tensor [..., K]."""
        values = torch.empty(like.shape, dtype=dtype, device=like.device)
        return cls(values, torch.empty((*like.shape[:-1], 1), dtype=torch.float32, device=like.device))


@dataclass(frozen=True)
class RowConfig:
    """Launch shape: `block` numbers (a power of two, one row a program) and warps."""

    block: int
    warps: int

    @classmethod
    def for_channels(cls, channels: int) -> RowConfig:
        """A row stays in registers: 64 values per thread at 8192, the padded 14B width.

        H100, 2160 rows of 5120 numbers: four warps take 10 us, sixteen 13.
        """
        block = 1 << (channels - 1).bit_length()
        return cls(block=block, warps=max(1, min(4 if block <= 8192 else 16, block // 512)))


def quantise_rows_ref(x: Tensor) -> Rows:
    """Compute what `quantise_rows` computes, in plain PyTorch (fp32 inside)."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)  # NaN wins
    finite = top.isfinite()
    top = top.clamp_min(TINIEST)
    # tensor by tensor: PyTorch divides a number by a tensor, and on CUDA a tensor by a number, as a product with a
    # reciprocal, which rounds twice
    most = torch.full_like(top, FP8_MAX)
    values = (x * (most / top)).clamp(-FP8_MAX, FP8_MAX)
    values = torch.where(finite, values, 0.0)
    return Rows(values.to(FP8), torch.where(finite, top / most, torch.nan))


if triton is not None:

    @triton.jit
    def row_top(y):
        """The largest size in numbers [BLOCK] fp32; infinity where one is NaN."""
        # tl.max may drop NaN, so NaN is made the largest number first
        return tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis=0)

    @triton.jit
    def row_scales(top):
        """(what to multiply a row with, its scale) for its largest size; (0, NaN) if that is no number."""
        finite = top < float("inf")
        top = tl.maximum(top, 7.888609052210118e-31)  # TINIEST
        most = tl.full((), 448.0, tl.float32)
        return tl.where(finite, tl.div_rn(most, top), 0.0), tl.where(
            finite, tl.div_rn(top, most), float("nan")
        )

    @triton.jit
    def row_values(y, factor):
        """Numbers in multiples of their row's scale, still fp32: up to 448, or the next number, which rounds to it."""
        return tl.where(factor > 0.0, y * factor, 0.0)

    @triton.jit
    def quantise_row(y):
        """One row [BLOCK] fp32, zeros past its end, to (values still fp32, scale)."""
        factor, scale = row_scales(row_top(y))
        return row_values(y, factor), scale

    @triton.jit
    def _quantise_rows_kernel(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, BLOCK)
        mask = channel < K
        y = tl.load(x_ptr + row * K + channel, mask, 0.0).to(tl.float32)
        values, scale = quantise_row(y)
        tl.store(out_ptr + row * K + channel, values.to(out_ptr.dtype.element_ty), mask)
        tl.store(scale_ptr + row, scale)


def quantise_rows(x: Tensor) -> Rows:
    """Quantise every row of `x`.

    Triton on CUDA, `quantise_rows_ref` elsewhere.

    Args:
        x: [..., K], contiguous, any floating-point dtype.

    Raises:
        ValueError: a layout that does not fit, with what was got and expected.
    """
    check_rows(x)
    return launch(x) if x.is_cuda and triton is not None else quantise_rows_ref(x)


def check_rows(x: Tensor) -> None:
    """Raise the ValueErrors of `quantise_rows`."""
    if x.dim() == 0 or not x.is_contiguous():
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected contiguous rows [..., K]"
        )


def launch(x: Tensor, dtype: torch.dtype = FP8) -> Rows:
    """Launch the Triton kernel; arguments as for `quantise_rows`, which has checked them.

    `dtype` of the values: fp32 leaves the rounding out, for tests (Triton's interpreter loses its carries).
    """
    out, channels = Rows.empty(x, dtype), x.shape[-1]
    if x.numel():
        config = RowConfig.for_channels(channels)
        _quantise_rows_kernel[(x.numel() // channels,)](
            x, out.values, out.scale, K=channels, BLOCK=config.block, num_warps=config.warps
        )
    return out
