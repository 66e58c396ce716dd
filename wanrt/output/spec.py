"""What a video is to a sink: size, exact frame rate, layout of its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from wanrt.errors import UsageError


def exact_fps(fps: Fraction | int | float | str) -> Fraction:
    """The exact rate that a written one means: 23.976 is 24000/1001, 16 is 16, "30000/1001" is itself.

    Decimal rates within 0.001 of an NTSC rate (n * 1000/1001, n a whole number) mean that rate: this is how
    23.976, 29.97 and 59.94 are written everywhere.

    Raises:
        UsageError: unless 0 < fps <= 1000.
    """
    try:
        rate = Fraction(str(fps)) if isinstance(fps, float) else Fraction(fps)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"fps: got {fps!r}, expected a number such as 16, 23.976 or 24000/1001") from error
    if not 0 < rate <= 1000:
        raise UsageError(f"fps: got {fps}, expected more than 0 and at most 1000")
    ntsc = Fraction(round(rate * 1001 / 1000) * 1000, 1001)
    if rate.denominator not in (1, 1001) and abs(rate - ntsc) < Fraction(1, 1000):
        return ntsc
    return rate


@dataclass(frozen=True)
class VideoSpec:
    """Size in pixels and frames per second of a video.

    Attributes:
        width: pixels, even (4:2:0 chroma).
        height: pixels, even.
        fps: exact rate; an int, float or string given is understood by `exact_fps`.

    Raises:
        UsageError: for an odd or non-positive size, or a rate outside 0..1000.
    """

    width: int
    height: int
    fps: Fraction

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", exact_fps(self.fps))
        if self.width <= 0 or self.height <= 0 or self.width % 2 or self.height % 2:
            raise UsageError(f"video size: got {self.width}x{self.height}, expected even numbers above 0")

    @property
    def time_base(self) -> Fraction:
        """Seconds per frame; timestamps are frame numbers in it, so the rate is constant and exact."""
        return 1 / self.fps

    def seconds(self, frames: int) -> Fraction:
        """How long that many frames last, in seconds."""
        return frames / self.fps


class PixelFormat(StrEnum):
    """What a sink finally needs: the layout that should cross from the device to the host."""

    NV12 = "nv12"  # uint8 [T, H * 3 // 2, W], BT.709 limited range
    RGB = "rgb24"  # uint8 [T, H, W, 3]
