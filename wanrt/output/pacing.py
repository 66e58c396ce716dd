"""Frames that come in bursts, shown at a constant rate: pure decisions, no thread and no clock of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

REANCHOR_SECONDS = 0.5  # later than this the schedule starts anew instead of being caught up with
ARRIVALS = 8  # that the generation rate is taken over
STEERING = 0.25  # how hard a burst too many or too few at hand moves the rate
SLOWEST = 0.05  # of the constant rate


class Pace(StrEnum):
    """What viewers see when generation is slower than the stream."""

    REPEAT = "repeat"  # full speed, the last frame held until the next comes
    SLOW = "slow"  # evenly slower: each frame shown longer
    BLEND = "blend"  # evenly slower, with cross-faded frames in between


class Metronome:
    """Deadlines of a constant rate, `anchor + n / fps`; started anew after a stall.

    Args:
        fps: ticks per second.
        now: when the first tick is due, in seconds.
    """

    def __init__(self, fps: float, now: float) -> None:
        self.fps, self.stalls = fps, 0
        self._anchor, self._tick = now, 0

    @property
    def due(self) -> float:
        """When the next tick is due."""
        return self._anchor + self._tick / self.fps

    def tick(self, now: float) -> None:
        """The due tick happens at `now`. One that is much too late moves the schedule; a little is caught
        up."""
        if now - self.due > REANCHOR_SECONDS:
            self.stalls += 1
            self._anchor, self._tick = now, 0
        self._tick += 1


@dataclass(frozen=True)
class Shown:
    """What one tick shows.

    Attributes:
        planes: the frame.
        repeated: the viewer saw just this at the tick before.
    """

    planes: np.ndarray
    repeated: bool


class Pacer:
    """Resamples arriving frames to ticks: `put` frames as they come, `take` one per tick.

    A tick advances by one frame (repeat), or by the ratio of the generation rate to the stream's (slow,
    blend), steered so that the frames at hand last until the next ones come. Without a next frame it stands
    still.
    """

    def __init__(self, pace: Pace, fps: float) -> None:
        self.pace, self.fps = pace, fps
        self._frames: deque[np.ndarray] = deque()  # the first is on screen once started
        self._position = 0.0  # from the first frame (0) to the second (1)
        self._started = False
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=ARRIVALS)

    @property
    def waiting(self) -> int:
        """Frames not yet shown."""
        return len(self._frames) - self._started

    def put(self, frames: list[np.ndarray], now: float) -> None:
        """Frames have come at `now`."""
        self._arrivals.append((now, len(frames)))
        self._frames.extend(frames)

    def take(self) -> Shown | None:
        """The frame of this tick; None before the first has come."""
        if not self._frames:
            return None
        if not self._started:
            self._started = True
            return Shown(self._frames[0], False)
        step = self._step() if self.waiting else 0.0
        self._position += step
        moved = self._let_go()
        between = self.pace is Pace.BLEND and self._position > 0
        planes = blend(self._frames[0], self._frames[1], self._position) if between else self._frames[0]
        return Shown(planes, repeated=not moved and not (between and step))

    def _let_go(self) -> bool:
        """Drop frames behind the position, never the last; whether there were any."""
        before = len(self._frames)
        while self._position >= 1 - 1e-9 and len(self._frames) > 1:
            self._frames.popleft()
            self._position = max(0.0, self._position - 1)
        if len(self._frames) == 1:
            self._position = 0.0
        return len(self._frames) < before

    def _step(self) -> float:
        """Frames per tick: 1, or less when generation cannot keep up."""
        rate = self.generation_rate
        if self.pace is Pace.REPEAT or rate is None or rate >= self.fps:
            return 1.0
        burst = self._arrivals[-1][1]
        excess = (
            self.waiting / burst - 0.5
        )  # frames that come in bursts leave half a burst at hand on average
        return min(1.0, max(SLOWEST, rate / self.fps * (1 + STEERING * excess)))

    @property
    def generation_rate(self) -> float | None:
        """Frames per second over the last arrivals; None before the second."""
        if len(self._arrivals) < 2 or self._arrivals[-1][0] <= self._arrivals[0][0]:
            return None
        frames = sum(count for _, count in list(self._arrivals)[1:])
        return frames / (self._arrivals[-1][0] - self._arrivals[0][0])


def blend(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """(1 - weight) of one uint8 frame and weight of another, in 1/256 steps."""
    share = round(256 * weight)
    mixed = first.astype(np.uint16) * (256 - share) + second.astype(np.uint16) * share + 128
    return (mixed >> 8).astype(np.uint8)
