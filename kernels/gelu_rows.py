"""GELU of a feed-forward's hidden numbers, quantised to fp8 rows for the next product, in one pass over memory.

The hidden activation is a block's largest (13824 wide in 14B). Read once in 16 bits and written once in 8, it costs
three bytes a number instead of the seven of GELU and quantisation one after the other. GELU is the tanh
approximation, as Wan-Video/Wan2.1 `wan/modules/model.py` at 9737cba has it, in fp32.

Shapes as in `quant_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.quant_rows import FP8, Rows, check_rows, quantise_rows_ref

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.quant_rows import row_scales, row_top, row_values
except ImportError:  # a CPU build of PyTorch brings no Triton; `gelu_rows_ref` serves there
    triton = None


@dataclass(frozen=True)
class GeluConfig:
    """Launch shape: one row a program, in three pieces that follow each other (powers of two), and warps.

    Its arithmetic, not its memory, is what takes time, so little of it is spent past a row's end: 13824 numbers are
    8192, 4096 and 2048, where one power of two would be 16384.
    """

    pieces: tuple[int, int, int]
    warps: int

    @classmethod
    def for_channels(cls, channels: int) -> GeluConfig:
        """The fewest numbers that cover a row."""
        left, pieces = channels, []
        for _ in range(2):
            pieces.append(1 << max(left, 1).bit_length() - 1)
            left = max(left - pieces[-1], 0)
        pieces.append(1 << max(left - 1, 0).bit_length())
        first, second, third = pieces
        return cls((first, second, third), warps=max(1, min(16, first // 512)))


def gelu_rows_ref(x: Tensor) -> Rows:
    """Compute what `gelu_rows` computes, in plain PyTorch (fp32 inside)."""
    return quantise_rows_ref(torch.nn.functional.gelu(x.float(), approximate="tanh"))


if triton is not None:

    @triton.jit
    def _gelu_piece(x_ptr, FIRST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
        """GELU of numbers FIRST to FIRST + BLOCK - 1 of a row, fp32; zeros from K on."""
        channel = FIRST + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + channel, channel < K, 0.0).to(tl.float32)
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)); u = sqrt(2 / pi) (x + 0.044715 x^3); -2 u log2(e) = x (a + b x^2)
        return x / (1.0 + tl.exp2(x * (-2.302208198144325 + -0.1029432395800235 * (x * x))))

    @triton.jit
    def _store_piece(out_ptr, values, FIRST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
        channel = FIRST + tl.arange(0, BLOCK)
        tl.store(out_ptr + channel, values.to(out_ptr.dtype.element_ty), channel < K)

    @triton.jit
    def _gelu_rows_kernel(
        x_ptr, out_ptr, scale_ptr, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * K
        out_ptr += row * K
        a, b, c = _gelu_piece(x_ptr, 0, K, A), _gelu_piece(x_ptr, A, K, B), _gelu_piece(x_ptr, A + B, K, C)
        factor, scale = row_scales(tl.maximum(tl.maximum(row_top(a), row_top(b)), row_top(c)))
        _store_piece(out_ptr, row_values(a, factor), 0, K, A)
        _store_piece(out_ptr, row_values(b, factor), A, K, B)
        _store_piece(out_ptr, row_values(c, factor), A + B, K, C)
        tl.store(scale_ptr + row, scale)


def gelu_rows(x: Tensor) -> Rows:
    """GELU, then quantise every row.

    Triton on CUDA, `gelu_rows_ref` elsewhere.

    Args:
        x: [..., K], contiguous, any floating-point dtype.

    Raises:
        ValueError: as `quantise_rows`.
    """
    check_rows(x)
    return launch(x) if x.is_cuda and triton is not None else gelu_rows_ref(x)


def launch(x: Tensor, dtype: torch.dtype = FP8) -> Rows:
    """Launch the Triton kernel; arguments as for `gelu_rows`, which has checked them.

    `dtype` of the values: fp32 leaves the rounding out, for tests (Triton's interpreter loses its carries).
    """
    out, channels = Rows.empty(x, dtype), x.shape[-1]
    if x.numel():
        config = GeluConfig.for_channels(channels)
        first, second, third = config.pieces
        _gelu_rows_kernel[(x.numel() // channels,)](
            x, out.values, out.scale, K=channels, A=first, B=second, C=third, num_warps=config.warps
        )
    return out
