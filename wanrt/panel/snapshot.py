"""What the panel is told: one frozen snapshot at a time, every field with a meaningful default."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Block = tuple[float, float]


class Phase(StrEnum):
    """Where the run is."""

    LOADING = "loading"
    RUNNING = "running"
    FINISHING = "finishing"


@dataclass(frozen=True, slots=True)
class LoadStep:
    """One step before the first chunk: "text encoder", "transformer", "warm-up".

    fraction: 0..1, None when unknown. detail: free text such as "8.4 of 13.9 GB". seconds: spent so far.
    """

    name: str
    state: Literal["waiting", "active", "done", "failed"] = "waiting"
    fraction: float | None = None
    detail: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage of one rank.

    busy_share: 0..1 over the run. bubble_ms: idle between two chunks, median; None where nothing waits.
    last: the work in progress or done last. blocks: busy intervals, seconds before the snapshot, (-2.5,
    -1.1); one that ends at 0.0 is still going on. chunk: the newest chunk seen.
    """

    name: str
    busy_share: float = 0.0
    bubble_ms: float | None = None
    last: str = ""
    blocks: tuple[Block, ...] = ()
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """A bounded queue: items in it, and how many it holds."""

    name: str
    depth: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in use. rss: the process tree; device: the fullest accelerator, with its size."""

    rss: int
    device_used: int | None = None
    device_total: int | None = None


@dataclass(frozen=True, slots=True)
class LiveTarget:
    """One live target: scheme and host, what it is doing, frames sent and dropped, its last failure."""

    name: str
    phase: str
    sent: int = 0
    dropped: int = 0
    connections: int = 0
    queued_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Live:
    """A live stream: frames repeated for want of new ones, frames shown late, schedules started anew, seconds of
    video at hand, seconds that generation has waited for the stream.
    """

    repeated: int = 0
    late: int = 0
    stalls: int = 0
    waiting_s: float = 0.0
    blocked_s: float = 0.0
    targets: tuple[LiveTarget, ...] = ()


@dataclass(frozen=True, slots=True)
class Typed:
    """The input line: its text, code points before the cursor, and the answer to the line before, shown while the
    text is empty.

    resumed: how often the terminal came back from another program, which has written to it.
    """

    text: str = ""
    cursor: int = 0
    answer: str = ""
    refused: bool = False
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at `at_s` (seconds of a monotonic clock; None: the moment it is shown).

    frames_done, frames_total: pixel frames delivered and wanted (None: endless). fps_target: of the video.
    period_s: median time of a chunk, sets the span of the moving bars. scene: number of the current scene
    from 1. blend_from, blend: during a transition the old prompt, and how much of the new one is in, 0..1.
    delay_s: how late blocks of other ranks or of a device become known; the bars end that long ago, so that none
    looks idle for want of news.
    encoder_lag_s: how far the encoder is behind, in seconds of video. warnings: newest last. live: of a stream,
    else None. prompt_to_pixel_s: from the last prompt said to its first frame seen.
    """

    phase: Phase = Phase.RUNNING
    at_s: float | None = None
    elapsed_s: float = 0.0
    title: str = ""
    subtitle: str = ""
    output: str = ""
    frames_done: int = 0
    frames_total: int | None = None
    fps_target: float | None = None
    fps_now: float | None = None
    fps_mean: float | None = None
    time_to_first_frame_s: float | None = None
    chunk: int | None = None
    period_s: float | None = None
    stages: tuple[StageRow, ...] = ()
    delay_s: float = 0.0
    queues: tuple[Queue, ...] = ()
    memory: Memory | None = None
    scene: int | None = None
    scenes: int | None = None
    prompt: str = ""
    blend_from: str | None = None
    blend: float | None = None
    encoder_lag_s: float | None = None
    warnings: tuple[str, ...] = ()
    load: tuple[LoadStep, ...] = ()
    live: Live | None = None
    paused: bool = False
    prompt_to_pixel_s: float | None = None

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last frame at the present rate; None while unknown or endless."""
        rate = self.fps_now or self.fps_mean
        if not rate or self.frames_total is None:
            return None
        return max(0, self.frames_total - self.frames_done) / rate


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. seconds: of the whole command. fps: mean. size: bytes of `output`.

    stopped: why it ended early ("SIGINT", "mesh rank 2 died"), empty when it did not. notes: lines to add.
    """

    output: str
    frames: int
    seconds: float
    fps: float | None = None
    size: int | None = None
    video_seconds: float | None = None
    time_to_first_frame_s: float | None = None
    stopped: str = ""
    notes: tuple[str, ...] = ()
