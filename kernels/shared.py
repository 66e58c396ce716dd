"""Tensors that several ranks have at addresses of their own, for kernels that read or write all of them.

Where GPUs reach each other's memory, a pointer to another one's is a pointer like any other: such a kernel loads where
the numbers on that rank begin, and goes on from there. Who waits for whom is the caller's to see to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton, and has no other rank's memory either
    triton = None


class Shared(NamedTuple):
    """A tensor of the same shape and layout on every rank.

    Attributes:
        here: this rank's own.
        addresses: int64 [N] on the device: where it begins on every rank, each a multiple of 16.
    """

    here: Tensor
    addresses: Tensor


if triton is not None:

    @triton.jit
    def pointer_on(rank, here_ptr, addresses_ptr):
        """Where a `Shared` begins on rank `rank`, a pointer of the same type as `here_ptr`."""
        begin = tl.load(addresses_ptr + rank).to(tl.pointer_type(here_ptr.dtype.element_ty))
        return tl.multiple_of(begin, 16)  # so that accesses are 16 bytes wide


def check_shared(name: str, tensor: Shared, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError, with what was got and expected, unless it is contiguous `shape` of `dtype` on N ranks."""
    here, addresses = tensor
    if tuple(here.shape) != tuple(shape) or here.dtype != dtype or not here.is_contiguous():
        raise ValueError(
            f"{name}: got {here.dtype} {tuple(here.shape)}, strides {here.stride()}; "
            f"expected contiguous {dtype} {tuple(shape)}"
        )
    if addresses.dim() != 1 or addresses.dtype != torch.int64 or addresses.device != here.device:
        raise ValueError(
            f"{name}: got addresses {addresses.dtype} {tuple(addresses.shape)} on {addresses.device}; "
            f"expected int64, one a rank, on {here.device}"
        )
