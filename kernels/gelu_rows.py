"""GELU of a feed-forward's hidden numbers, quantised to fp8 rows for the next product, in one pass over memory.

The hidden activation is a block's largest (13824 wide in 14B). Read once in 16 bits and written once in 8, it costs
three bytes a number instead of the seven of GELU and quantisation one after the other. GELU is the tanh
approximation, as Wan-Video/Wan2.1 `wan/modules/model.py` at 9737cba has it, in fp32.

Shapes as in `quant_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanrt_kernels.quant_rows import FP8, RowConfig, Rows, check_rows, quantise_rows_ref

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.quant_rows import quantise_row
except ImportError:  # a CPU build of PyTorch brings no Triton; `gelu_rows_ref` serves there
    triton = None


def gelu_rows_ref(x: Tensor) -> Rows:
    """Compute what `gelu_rows` computes, in plain PyTorch (fp32 inside)."""
    return quantise_rows_ref(torch.nn.functional.gelu(x.float(), approximate="tanh"))


if triton is not None:

    @triton.jit
    def _gelu_rows_kernel(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, BLOCK)
        mask = channel < K
        x = tl.load(x_ptr + row * K + channel, mask, 0.0).to(tl.float32)
        # (1 + tanh(u)) / 2 = sigmoid(2 u); u = sqrt(2 / pi) (x + 0.044715 x^3)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        values, scale = quantise_row(y)
        tl.store(out_ptr + row * K + channel, values.to(out_ptr.dtype.element_ty), mask)
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
        config = RowConfig.for_channels(channels)
        _gelu_rows_kernel[(x.numel() // channels,)](
            x, out.values, out.scale, K=channels, BLOCK=config.block, num_warps=config.warps
        )
    return out
