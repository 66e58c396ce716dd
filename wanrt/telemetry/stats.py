"""Running aggregates of a recording, and the frozen summary they give."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from wanrt.telemetry.quantiles import Reservoir, quantile
from wanrt.telemetry.spans import IntervalUnion, Span, attribute_gap

SCHEMA_VERSION = 1
RECENT = 256  # spans a stage keeps for telling what the others waited for: sixteen chunks at sixteen spans


@dataclass(frozen=True, slots=True)
class Spread:
    """A series in short, in milliseconds; None where there is no value yet."""

    count: int = 0
    mean_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    max_ms: float | None = None

    @classmethod
    def of(cls, series: Reservoir, pending: Iterable[float] = ()) -> Spread:
        """Spread of a reservoir of nanoseconds and of values that are not in it yet."""
        late = tuple(pending)
        sample = (*series.sample, *late)
        if not sample:
            return cls()
        count = series.count + len(late)
        return cls(
            count=count,
            mean_ms=(series.sum + sum(late)) / count / 1e6,
            p50_ms=quantile(sample, 0.50) / 1e6,
            p95_ms=quantile(sample, 0.95) / 1e6,
            max_ms=max(series.max, *late, 0.0) / 1e6,
        )


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage of one rank. Times in milliseconds unless named otherwise.

    busy_share: part (0..1) of the time from the first chunk's first span on any stage to the last span's end.
    period: from the end of one chunk to the end of the next on this stage.
    bubble: idle from the end of one chunk to the start of the next; `waited_for` says who was at work
    meanwhile,
        by "stage/name", in mean milliseconds per bubble.
    spans: every kind of work by name.
    """

    stage: str
    rank: str
    busy_share: float
    busy_s: float
    period: Spread
    bubble: Spread
    waited_for: Mapping[str, float] = field(default_factory=dict)
    spans: Mapping[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stats:
    """A whole recording.

    period: of frames delivered, chunk to chunk. fps_mean: pixel frames per second between the first and the
    last delivery (the first delivery's frames not counted); None before the second. fps_now: the same over
    the last eight deliveries. frames_late: frames delivered later than `first delivery + index / fps`, i.e.
    too late for a player that started at the first frame. prompt_to_pixel: from a prompt's arrival to the
    first frame made with it.
    """

    wall_s: float
    chunks: int
    frames: int
    fps_now: float | None
    fps_mean: float | None
    time_to_first_frame_s: float | None
    frames_late: int
    period: Spread
    prompt_to_pixel: Spread
    spans_recorded: int
    stages: tuple[StageStats, ...]

    def stage(self, stage: str, rank: str | None = None) -> StageStats | None:
        """The stage of that name (of that rank, or of the first rank that has it), or None."""
        return next((s for s in self.stages if s.stage == stage and rank in (None, s.rank)), None)


class StageAggregate:
    """Running totals of one stage of one rank; `history` chunks stay open for spans that are resolved
    late.
    """

    def __init__(self, history: int = 16) -> None:
        self._history = history
        self.recent: deque[Span] = deque(maxlen=RECENT)
        self._chunks: dict[int, tuple[int, int]] = {}
        self.union = IntervalUnion()
        self.names: dict[str, Reservoir] = {}
        self.periods = Reservoir()
        self.bubbles = Reservoir()
        self.waits: dict[str, int] = {}

    def add(self, span: Span) -> None:
        """Count one finished span."""
        series = self.names.get(span.name)
        if series is None:
            series = self.names[span.name] = Reservoir()
        series.add(span.end_ns - span.start_ns)
        self.recent.append(span)
        if span.chunk is None:
            return
        self.union.add(span.start_ns, span.end_ns)
        known = self._chunks.get(span.chunk)
        if known:
            self._chunks[span.chunk] = (min(known[0], span.start_ns), max(known[1], span.end_ns))
        else:
            self._chunks[span.chunk] = (span.start_ns, span.end_ns)

    @property
    def unsettled(self) -> bool:
        """Whether there are chunks beyond the open history."""
        return len(self._chunks) > self._history

    def settle(self, others: tuple[Span, ...]) -> None:
        """Turn chunks beyond the open history into periods and bubbles; `others`: other stages' recent
        spans.
        """
        while len(self._chunks) > self._history:
            oldest, following = sorted(self._chunks)[:2]
            self._close(self._chunks.pop(oldest), self._chunks[following], others)

    def _close(self, one: tuple[int, int], following: tuple[int, int], others: tuple[Span, ...]) -> None:
        self.periods.add(following[1] - one[1])
        self.bubbles.add(max(0, following[0] - one[1]))
        for label, length in attribute_gap(one[1], following[0], others).items():
            self.waits[label] = self.waits.get(label, 0) + length

    def open_pairs(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Neighbouring chunks that are not settled yet, in order."""
        ordered = [self._chunks[c] for c in sorted(self._chunks)]
        return list(itertools.pairwise(ordered))

    def summary(self, stage: str, rank: str, window_ns: int, others: tuple[Span, ...]) -> StageStats:
        """The stage as of now, open chunks included."""
        pairs = self.open_pairs()
        waits = dict(self.waits)
        for one, following in pairs:
            for label, length in attribute_gap(one[1], following[0], others).items():
                waits[label] = waits.get(label, 0) + length
        bubbles = self.bubbles.count + len(pairs)
        return StageStats(
            stage=stage,
            rank=rank,
            busy_share=min(1.0, self.union.total / window_ns) if window_ns else 0.0,
            busy_s=self.union.total / 1e9,
            period=Spread.of(self.periods, [b[1] - a[1] for a, b in pairs]),
            bubble=Spread.of(self.bubbles, [max(0, b[0] - a[1]) for a, b in pairs]),
            waited_for={k: v / bubbles / 1e6 for k, v in sorted(waits.items(), key=lambda item: -item[1])},
            spans={name: Spread.of(series) for name, series in self.names.items()},
        )


class DeliveryAggregate:
    """Frames as they leave the pipeline: rates, first frame, lateness, prompt latency."""

    def __init__(self, started_ns: int, fps: Fraction | None) -> None:
        self._started_ns = started_ns
        self._fps = fps
        self._first: tuple[int, int] | None = None
        self._last_ns = started_ns
        self._recent: deque[tuple[int, int]] = deque(maxlen=9)
        self._prompts: deque[tuple[int, int]] = deque(maxlen=64)
        self._periods = Reservoir()
        self._latencies = Reservoir()
        self.frames = 0
        self.chunks = 0
        self.late = 0

    def prompt(self, chunk: int, at_ns: int) -> None:
        """A prompt arrived at `at_ns`; `chunk` is the first to be made with it. The first one for a chunk counts."""
        if self._prompts and self._prompts[-1][0] >= chunk:
            return
        self._prompts.append((chunk, at_ns))

    def deliver(self, chunk: int, count: int, at_ns: int) -> None:
        """`count` pixel frames of `chunk` left the pipeline."""
        if self._first is None:
            self._first = (at_ns, count)
        else:
            self._periods.add(at_ns - self._last_ns)
        self.late += self._count_late(count, at_ns)
        self.frames += count
        self.chunks += 1
        self._last_ns = at_ns
        self._recent.append((at_ns, count))
        while self._prompts and self._prompts[0][0] <= chunk:
            self._latencies.add(at_ns - self._prompts.popleft()[1])

    def _count_late(self, count: int, at_ns: int) -> int:
        """Of the frames delivered now, those whose time of display has passed; that time grows with the
        index.
        """
        if self._fps is None or self._first is None:
            return 0
        due = (at_ns - self._first[0]) * self._fps / 1_000_000_000
        first_in_time = -(-due.numerator // due.denominator)
        return min(count, max(0, first_in_time - self.frames))

    def rates(self) -> tuple[float | None, float | None]:
        """Pixel frames per second now (last eight deliveries) and on average."""
        if self._first is None or self._last_ns <= self._first[0]:
            return None, None
        mean = (self.frames - self._first[1]) * 1e9 / (self._last_ns - self._first[0])
        oldest = self._recent[0]
        frames = sum(count for _, count in self._recent) - oldest[1]
        span = self._last_ns - oldest[0]
        return (frames * 1e9 / span if span else mean), mean

    def spreads(self) -> tuple[Spread, Spread]:
        """Delivery period and prompt-to-pixel latency."""
        return Spread.of(self._periods), Spread.of(self._latencies)

    @property
    def time_to_first_frame_s(self) -> float | None:
        """Seconds from the start of the recording to the first delivery."""
        return (self._first[0] - self._started_ns) / 1e9 if self._first else None
