"""Softmax of attention scores, read in fp32 and written once, in the precision of the product that follows.

PyTorch's softmax writes fp32, and a cast reads and writes all of it again; on 6240 x 6240 scores the two take 0.31 ms
on an H100, where the bytes alone need 0.08. Each row stays in registers between its one read and its one write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton; `softmax_rows_ref` serves there
    triton = None

LONGEST = 1 << 16  # scores of a row: 64 a thread of the largest block


@dataclass(frozen=True)
class SoftmaxConfig:
    """Launch shape: `block` scores (a power of two, one row a program) and warps."""

    block: int
    warps: int

    @classmethod
    def for_length(cls, length: int) -> SoftmaxConfig:
        """32 scores a thread, so that their loads are all under way at once."""
        block = 1 << (length - 1).bit_length()
        return cls(block=block, warps=max(1, min(32, block // 1024)))


def softmax_rows_ref(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute what `softmax_rows` computes, in plain PyTorch."""
    return scores.softmax(-1).to(dtype)


if triton is not None:

    @triton.jit
    def _softmax_rows_kernel(scores_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * N
        column = tl.arange(0, BLOCK)
        mask = column < N
        x = tl.load(scores_ptr + row + column, mask, float("-inf"))
        x = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row + column, (x / tl.sum(x, axis=0)).to(out_ptr.dtype.element_ty), mask)


def softmax_rows(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(x) / sum(exp(x)) along the last axis.

    Triton on CUDA, for rows up to `LONGEST`; `softmax_rows_ref` elsewhere.

    Args:
        scores: [..., N] fp32, contiguous.
        dtype: of the result; rounded once.

    Returns:
        [..., N], in `dtype`.

    Raises:
        ValueError: another dtype or layout, with what was got and expected.
    """
    if scores.dtype != torch.float32 or not scores.is_contiguous():
        raise ValueError(
            f"scores: got {scores.dtype} with strides {scores.stride()}; expected contiguous fp32"
        )
    if scores.is_cuda and triton is not None and scores.shape[-1] <= LONGEST:
        return launch(scores, dtype)
    return softmax_rows_ref(scores, dtype)


def launch(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch the Triton kernel; arguments as for `softmax_rows`, which has checked them."""
    length = scores.shape[-1]
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    config = SoftmaxConfig.for_length(length)
    _softmax_rows_kernel[(scores.numel() // length,)](
        scores, out, N=length, BLOCK=config.block, num_warps=config.warps
    )
    return out
