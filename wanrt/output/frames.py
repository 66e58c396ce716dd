"""Frames on their way to a sink: checked, converted once, on the device where they are, and fetched without
a wait."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from wanrt_kernels.nv12 import rgb_to_nv12

from .spec import PixelFormat, VideoSpec

log = logging.getLogger("wanrt.output")


@dataclass(frozen=True)
class FrameBlock:
    """Frames in host memory, in a sink's own format.

    Attributes:
        data: uint8 on the CPU; [T, H * 3 // 2, W] for NV12, [T, H, W, 3] for RGB.
        pixel_format: which of the two.
        ready: recorded behind the copy from the device; None when the data is there already.
    """

    data: Tensor
    pixel_format: PixelFormat
    ready: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return self.data.shape[0]

    def numpy(self) -> np.ndarray:
        """The bytes, after waiting for the copy when there is one under way."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.data.numpy()


Pixels: TypeAlias = Tensor | np.ndarray | FrameBlock


def to_block(pixels: Pixels, spec: VideoSpec, wanted: PixelFormat) -> FrameBlock:
    """Check frames and convert them to what a sink wants.

    From a CUDA tensor the conversion is queued on the current stream, then an asynchronous copy into pinned
    memory, so that the caller does not wait and NV12 leaves the device as 1.5 bytes a pixel.

    Args:
        pixels: as in `Sink.write`.
        spec: the size that frames must have.
        wanted: the sink's format.

    Raises:
        ValueError: for another shape, size or dtype, or a block in another format.
    """
    if isinstance(pixels, FrameBlock):
        return _checked_block(pixels, spec, wanted)
    tensor = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
    expected = (spec.height, spec.width, 3)
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != expected:
        raise ValueError(
            f"frames: got shape {list(tensor.shape)}, expected [T, {', '.join(map(str, expected))}]"
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ValueError(f"frames: got {tensor.dtype}, expected uint8 (0..255) or floating ([-1, 1])")
    converted = rgb_to_nv12(tensor) if wanted is PixelFormat.NV12 else _to_rgb_bytes(tensor)
    return _fetch(converted, wanted)


def _checked_block(block: FrameBlock, spec: VideoSpec, wanted: PixelFormat) -> FrameBlock:
    shape = (spec.height * 3 // 2, spec.width) if wanted is PixelFormat.NV12 else (spec.height, spec.width, 3)
    if block.pixel_format is not wanted or tuple(block.data.shape[1:]) != shape:
        got = f"{block.pixel_format} {list(block.data.shape)}"
        raise ValueError(f"frames: got {got}, expected {wanted} [T, {', '.join(map(str, shape))}]")
    return block


def _to_rgb_bytes(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.contiguous()
    levels = ((pixels.float() + 1.0) * 127.5 + 0.5).clamp(0.0, 255.0)
    return levels.to(torch.uint8).contiguous()


def _fetch(converted: Tensor, pixel_format: PixelFormat) -> FrameBlock:
    if not converted.is_cuda:
        return FrameBlock(converted.cpu(), pixel_format)
    host = torch.empty(converted.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(converted, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(converted.device))
    return FrameBlock(host, pixel_format, ready)
