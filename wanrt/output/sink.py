"""The interface of everything that takes frames: files, image sequences, live streams."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .spec import PixelFormat, VideoSpec

if TYPE_CHECKING:
    from .frames import Pixels


class Sink(ABC):
    """Takes frames in order, from one thread at a time.

    Attributes:
        spec: size and rate.
        pixel_format: what the sink needs; `write` converts to it.
        frames_written: frames taken so far.
    """

    spec: VideoSpec
    pixel_format: PixelFormat
    frames_written: int = 0

    @abstractmethod
    def write(self, pixels: Pixels) -> None:
        """Take frames.

        Args:
            pixels: RGB [T, H, W, 3] as a NumPy array or as a tensor of any strides on any device, uint8 or
            floating in
                [-1, 1]; or a `FrameBlock` (already converted, perhaps still on its way from a device). Not
                to be changed afterwards.

        Raises:
            OutputError: when the frames cannot be encoded or written; `abort` then keeps what was written.
            ValueError: for a shape or dtype that is not the one described.
        """

    def flush_chunk(self) -> None:  # noqa: B027 (optional)
        """Put everything taken so far where it survives a SIGKILL. Called at chunk boundaries.

        Raises:
            OutputError: when it cannot be written.
        """

    def end(self) -> None:  # noqa: B027 (optional)
        """No more frames will come; returns at once. For sinks that show the last frame until the next one."""

    @abstractmethod
    def finish(self) -> Path:
        """Complete the video under its final name, also when it was cut short, and return that name.

        Raises:
            OutputError: when it cannot be completed (says which file holds what was written), or no frame
            came.
        """

    @abstractmethod
    def abort(self) -> Path | None:
        """After an error: stop, keep what was written playable, return its path (None: nothing is)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()
