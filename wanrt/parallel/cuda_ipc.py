"""Device memory lent between processes, by the CUDA driver's own handles (CUDA Driver API, "cuIpcGetMemHandle").

PyTorch's symmetric memory would do as much, but it counts its exchanges in each process: a process that has left one
group never meets the fresh processes of another (torch 2.11, `StoreExchange`), and a benchmark's process meets many.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.nvrtc import check, driver

LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


@dataclass(frozen=True)
class Lent:
    """A tensor for other processes of this machine: the handle of its allocation, and where it begins in it."""

    handle: bytes
    offset: int


def lend(tensor: Tensor) -> Lent:
    """Offer a CUDA tensor, which must live as long as others use it.

    Raises `NvrtcError` with the driver's words where its allocation cannot be shared.
    """
    address, base, handle = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(), _Handle()
    with torch.cuda.device(tensor.device):
        check(driver().cuMemGetAddressRange_v2(ctypes.byref(base), None, address))
        check(driver().cuIpcGetMemHandle(ctypes.byref(handle), base))
    return Lent(bytes(handle), address.value - base.value)


def borrow(handle: bytes, device: torch.device) -> int:
    """Where an allocation of another process begins for kernels on `device`. Once a handle; see `give_back`.

    Raises `NvrtcError` with the driver's words.
    """
    address = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # PyTorch makes the device's context
        opened = driver().cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), LAZY_ENABLE_PEER_ACCESS
        )
        check(opened)
    return address.value


def give_back(address: int, device: torch.device) -> None:
    """Unmap what `borrow` gave. In an ending process the driver has done it already, so nobody asks for success."""
    with torch.cuda.device(device):
        driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))
