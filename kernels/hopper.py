"""What kernels for Hopper share on the host: `hopper.cuh` in front of a source, and the copy engine's descriptions."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wanrt_kernels import nvrtc

ARCHITECTURE, CAPABILITY = "sm_90a", (9, 0)
TYPES = {torch.float16: ("f16", 6), torch.bfloat16: ("bf16", 9)}  # PTX's name, CUtensorMapDataType
SHARED_BYTES = 232448  # 227 KiB, all that a block of this architecture may have
SWIZZLES = {64: 2, 128: 3}  # bytes: CU_TENSOR_MAP_SWIZZLE_64B and _128B
L2_PROMOTION = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B


def unsupported_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel for Hopper can run there, in a few words; None: they can."""
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU"
    if dtype not in TYPES:
        return f"{dtype} is not a half precision"
    try:
        nvrtc.nvrtc()
        nvrtc.driver()
    except nvrtc.NvrtcError as error:
        return str(error)
    return None


def source(name: str, kind: str, numbers: Mapping[str, int | str], products: str) -> str:
    """The CUDA C++ of file `name`, behind its numbers, what is shared, and the functions that say its products.

    kind: "f16" or "bf16", what sums are rounded to.
    """
    folder = Path(__file__).parent
    defines = "".join(f"#define {key} {value}\n" for key, value in numbers.items())
    shared, kernel = ((folder / file).read_text(encoding="utf-8") for file in ("hopper.cuh", name))
    return f'{defines}#define PACK "cvt.rn.{kind}x2.f32"\n{shared}{products}{kernel}'


def registers(count: int) -> str:
    """The first `count` operands of an inline PTX instruction, as it lists registers."""
    return ", ".join(f"%{i}" for i in range(count))


def operands(name: str, count: int) -> str:
    """`count` floats of an array, as what an inline PTX instruction reads and writes."""
    return ", ".join(f'"+f"({name}[{i}])' for i in range(count))


def tensor_map(x: Tensor, box: tuple[int, ...], code: int, *, swizzle: int) -> ctypes.Array:
    """The copy engine's description (CUtensorMap, 128 bytes) of a tensor whose last axis is contiguous, read in boxes.

    box: its sizes, innermost axis first. Outside the tensor it reads zeros. code: CUtensorMapDataType. swizzle: bytes
    that the box's innermost axis spans, 64 or 128.
    """
    rank = x.dim()
    sizes = (ctypes.c_uint64 * rank)(*reversed(x.shape))
    strides = (ctypes.c_uint64 * (rank - 1))(*(s * x.element_size() for s in reversed(x.stride()[:-1])))
    boxes, steps = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(1,) * rank)
    room = (ctypes.c_char * 192)()  # the description must begin at a multiple of 64
    described = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
    layout = (sizes, strides, boxes, steps)
    address = ctypes.c_void_p(x.data_ptr())
    encode = nvrtc.driver().cuTensorMapEncodeTiled
    mode = SWIZZLES[swizzle]
    nvrtc.check(encode(ctypes.byref(described), code, rank, address, *layout, 0, mode, L2_PROMOTION, 0))
    return described
