"""The causal 3x3x3 convolution over a window of frames, for Hopper: `conv_window.cu` and what surrounds it.

Frames without a past meet only the last of three time taps: the same kernel convolves them with one, 3x3.

cuDNN has faster and slower algorithms for it and no rule that finds the fast ones; a race finds them, but another one
may win in another process and rounds otherwise. This kernel is one algorithm: same bits every time, nothing to race.

It adds what a convolution leaves undone, bias and skip connection, before it rounds: PyTorch's passes over memory for
that are not needed.

Layout: channels last. T frames behind two older ones (with one time tap: none), C channels in, O out.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt_kernels import cubins, nvrtc
from wanrt_kernels.hopper import (
    ARCHITECTURE,
    SHARED_BYTES,
    TYPES,
    operands,
    registers,
    source,
    tensor_map,
    unsupported_device,
)

SWITCH = "WANRT_HOPPER_CONV"  # 0: off, to compare, or for a device that hangs: this kernel waits for the copy engine
CHUNK, TILE_HEIGHT, THREADS = 32, 8, 384  # channels of a step, rows of a tile, threads of a block
SLACK_BYTES = 1024 + 256  # for alignment, and for the barriers
# (pixels, outputs) of a tile: what a product costs in it, relative: small ones read more of the L2 cache for each. From
# the times of every tile on an H100 (PyTorch 2.11, fp16) in the nine shapes of tests/kernels/test_conv_window.py.
TILES = {(256, 192): 1.0, (128, 192): 1.17, (256, 96): 0.97, (128, 96): 1.4}


def conv_window_ref(
    window: Tensor,
    weight: Tensor,
    rows: tuple[int, int] | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute what `conv_window` computes, with PyTorch's own convolution. Same arguments, same result.

    Where that leaves rows unwritten, zeros are here.
    """
    taps = weight.unflatten(1, (-1, 3, 3, window.shape[3])).permute(0, 4, 1, 2, 3)
    out = F.conv3d(window.permute(3, 0, 1, 2)[None], taps, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    for more in (bias, residual):
        out = out if more is None else out + more
    out = out.to(window.dtype)
    first, last = rows or (0, window.shape[1])
    written = torch.zeros_like(out, memory_format=torch.contiguous_format)
    written[:, first:last] = out[:, first:last]
    return written


@dataclass(frozen=True)
class ConvConfig:
    """One compiled form.

    Attributes:
        channels, outputs: C and O.
        pixels: of a block's tile, 128 or 256; 8 high.
        columns: outputs of a tile.
        kind: "f16" or "bf16".
        taps: in time, 3 or 1.
    """

    channels: int
    outputs: int
    pixels: int
    columns: int
    kind: str
    taps: int = 3

    @property
    def tile_width(self) -> int:
        """Pixels across a tile."""
        return self.pixels // TILE_HEIGHT

    @property
    def stages(self) -> int:
        """Steps that shared memory holds."""
        step = 2 * CHUNK * ((self.tile_width + 2) * TILE_HEIGHT + 3 * self.columns)
        return (SHARED_BYTES - SLACK_BYTES) // step

    def turns(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(tiles, which blocks take in turn, tiles across, tiles down) of so many rows to compute."""
        across, down = -(-width // self.tile_width), -(-height // TILE_HEIGHT)
        return across * down * frames * (self.outputs // self.columns), across, down

    def source(self) -> str:
        """The kernel's CUDA C++ with this form's numbers in front."""
        numbers = {
            "CHANNELS": self.channels, "OUTPUTS": self.outputs, "TAPS": self.taps, "BM": self.pixels,
            "BN": self.columns, "STAGES": self.stages, "UNPACK": f'"cvt.f32.{self.kind}"',
        }  # fmt: skip
        return source("conv_window.cu", self.kind, numbers, wgmma_source(self.columns, self.kind))


def wgmma_source(columns: int, kind: str) -> str:
    """`wgmma(sums, a, b)`: 64 x `columns` sums += 64 x 16 times 16 x `columns`, both operands in shared memory."""
    count = columns // 2  # sums a thread
    return f"""__device__ __forceinline__ void wgmma(
    float (&d)[{count}], unsigned long long a, unsigned long long b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
                 "{{{registers(count)}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
                 : {operands("d", count)} : "l"(a), "l"(b));
}}
"""


def forms(channels: int, outputs: int, kind: str, taps: int = 3) -> tuple[ConvConfig, ...]:
    """The kernel's forms for these sizes, large tiles first; none where it has none."""
    return tuple(
        ConvConfig(channels, outputs, pixels, columns, kind, taps)
        for pixels, columns in TILES
        if channels % CHUNK == 0 and outputs % columns == 0
    )


def choose(options: tuple[ConvConfig, ...], clip: tuple[int, int, int], processors: int) -> ConvConfig:
    """The form that should be fastest: waves of tiles, times the products of a tile, times what each costs in it.

    clip: frames, rows to compute, width.
    """

    def cost(form: ConvConfig) -> float:
        waves = -(-form.turns(*clip)[0] // processors)
        return waves * form.pixels * form.columns * TILES[form.pixels, form.columns]

    return min(options, key=cost)


def why_not(device: torch.device, channels: int, outputs: int, dtype: torch.dtype) -> str | None:
    """Why this kernel is not for a convolution, in a few words; None: it is."""
    reason = unsupported(device, channels, outputs, dtype)
    if reason is None and os.environ.get(SWITCH) == "0":
        return f"wanrt's own kernel is switched off by {SWITCH}=0"
    return reason


def unsupported(device: torch.device, channels: int, outputs: int, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot run a convolution, in a few words; None: it can."""
    if reason := unsupported_device(device, dtype):
        return reason
    return (
        None if forms(channels, outputs, TYPES[dtype][0]) else f"no form for {channels} channels to {outputs}"
    )


def conv_window(
    window: Tensor,
    weight: Tensor,
    rows: tuple[int, int] | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve [T + 2, H, W, C] with [O, 27 C] to [T, H, W, O]: valid in time, zeros around the picture.

    Args:
        window: contiguous, fp16 or bf16, on a device for which `unsupported` has nothing to say.
        weight: contiguous, in the window's dtype; 27 taps (time, row, column) of C channels for each output. Or 9:
            [T, H, W, C] with [O, 9 C] to [T, H, W, O], frame by frame.
        rows: (first, last): computes output rows `first` to `last` - 1 and leaves the others unwritten; None: all.
        bias: [O], contiguous fp32, to add.
        residual: [T, H, W, O], contiguous, in the window's dtype, to add.

    Returns:
        A new tensor in the window's dtype, summed in fp32 and rounded once.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, with what was got and expected.
        NvrtcError: what the compiler or the driver says.
    """
    _check(window, weight, rows)
    _check_more(window, weight, bias, residual)
    channels = window.shape[3]
    taps = weight.shape[1] // (9 * channels)
    frames, height, width = _clip(window, taps)
    first, last = rows or (0, height)
    processors = torch.cuda.get_device_properties(window.device).multi_processor_count
    options = forms(channels, weight.shape[0], TYPES[window.dtype][0], taps)
    form = choose(options, (frames, last - first, width), processors)
    return launch(window, weight, form, rows, bias=bias, residual=residual)


def _clip(window: Tensor, taps: int) -> tuple[int, int, int]:
    """(frames, height, width) of the result."""
    frames, height, width, _ = window.shape
    return frames - taps + 1, height, width


def launch(
    window: Tensor,
    weight: Tensor,
    form: ConvConfig,
    rows: tuple[int, int] | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Launch one form of the kernel; arguments as for `conv_window`, which has checked them."""
    frames, height, width = _clip(window, form.taps)
    first, last = rows or (0, height)
    out = window.new_empty(frames, height, width, form.outputs)
    turns, across, down = form.turns(frames, last - first, width)
    code = TYPES[window.dtype][1]
    processors = torch.cuda.get_device_properties(window.device).multi_processor_count
    with torch.cuda.device(window.device):
        arguments = (
            # column after column: a column of pixels is a group of matrix rows
            tensor_map(
                window.transpose(1, 2), (CHUNK, TILE_HEIGHT, form.tile_width + 2, 1), code, swizzle=2 * CHUNK
            ),
            tensor_map(weight, (CHUNK, form.columns), code, swizzle=2 * CHUNK),
            *(_address(x) for x in (out, bias, residual)),
            *(ctypes.c_int(value) for value in (turns, across, down, height, width, first, last)),
        )
        _function(form, window.device.index)(min(turns, processors), THREADS, arguments)
    return out


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _check(window: Tensor, weight: Tensor, rows: tuple[int, int] | None) -> None:
    if window.dim() != 4 or not window.is_contiguous():
        raise ValueError(
            f"window: got shape {tuple(window.shape)}, strides {window.stride()}; expected contiguous [T + 2, H, W, C]"
        )
    frames, height, _, channels = window.shape
    if rows is not None and not 0 <= rows[0] < rows[1] <= height:
        raise ValueError(f"rows: got {rows}, expected at least one of rows 0 to {height - 1}")
    reason = unsupported(window.device, channels, weight.shape[0], window.dtype)
    if reason is not None:
        raise ValueError(f"conv_window: {reason}; use conv_window_ref")
    if (
        weight.shape[1:] not in ((27 * channels,), (9 * channels,))
        or weight.dtype != window.dtype
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"weight: got {weight.dtype} {tuple(weight.shape)}; expected contiguous {window.dtype} "
            f"[O, {27 * channels}] or [O, {9 * channels}]"
        )
    if frames < (taps := weight.shape[1] // (9 * channels)):
        raise ValueError(f"window: got {frames} frames for {taps} taps in time; expected {taps} at least")


def _check_more(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    outputs = weight.shape[0]
    clip = _clip(window, weight.shape[1] // (9 * window.shape[3]))
    expected = {
        "bias": (bias, (outputs,), torch.float32),
        "residual": (residual, (*clip, outputs), window.dtype),
    }
    for name, (x, shape, dtype) in expected.items():
        if x is None or (tuple(x.shape), x.dtype, x.is_contiguous()) == (shape, dtype, True):
            continue
        raise ValueError(
            f"{name}: got {x.dtype} {tuple(x.shape)}, strides {x.stride()}; expected contiguous {dtype} {list(shape)}"
        )


@cache
def _function(form: ConvConfig, device: int) -> nvrtc.Function:
    """Loaded once a form and device; compiled, where that is not kept, in about half a second."""
    return nvrtc.Function(cubins.cubin(form.source(), ARCHITECTURE), "conv_window", SHARED_BYTES)
