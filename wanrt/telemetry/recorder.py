"""`Recorder`: where every stage writes what it did and when; one per process.

    recorder = Recorder(fps=job.fps, device_clock=clock_for(job.device))
    with recorder.span("mesh", "step", chunk=4, step=0):
        ...
    recorder.frames(chunk=4, count=12)

Spans are stamped on the device's own stream when there is a device clock, and resolved when the device has
passed them; nothing here waits for a device. Work that stays on the host (encoders, queues) says `host=True`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from wanrt.telemetry.clocks import Clock, DeviceClock, host_clock
from wanrt.telemetry.spans import Mark, Span
from wanrt.telemetry.stats import DeliveryAggregate, StageAggregate, Stats

RING = 65_536  # spans kept for the trace: some hours of a stream at 20 spans a chunk; 300 bytes each
LATE_NS = 10_000_000_000  # spans arrive in the order they are resolved, at most some seconds out of order
PENDING = 64  # spans that wait for the device or for their turn before a stage polls on its own


class _OpenSpan(AbstractContextManager[None]):
    """A span being measured. Slots and few calls: it is entered some thirty times a chunk on the critical
    path.
    """

    __slots__ = ("attrs", "chunk", "depth", "host", "name", "recorder", "stage", "start", "ticket")

    def __init__(
        self,
        recorder: Recorder,
        stage: str,
        name: str,
        chunk: int | None,
        host: bool,
        attrs: Mapping[str, object],
    ) -> None:
        self.recorder, self.stage, self.name, self.chunk = recorder, stage, name, chunk
        self.host, self.attrs = host, attrs
        self.depth = 0
        self.start: int | None = None
        self.ticket: Any = None

    def __enter__(self) -> None:
        self.recorder._enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.recorder._leave(self)


class Recorder:
    """Spans, marks and deliveries of one process, with running statistics.

    fps: of the video, for lateness; None: no frame counts as late. device_clock: see `clock_for`. rank: the
    name of this process in stats and trace. started_ns: what time to first frame counts from, on `clock`'s
    scale (default: now). Memory is bounded: the newest `ring` spans are kept whole, the rest lives on in
    aggregates. Every method may be called from any thread.
    """

    def __init__(
        self,
        *,
        fps: Fraction | float | None = None,
        device_clock: DeviceClock | None = None,
        rank: str = "main",
        clock: Clock = host_clock,
        started_ns: int | None = None,
        ring: int = RING,
    ) -> None:
        self.rank = rank
        self.clock = clock
        self.started_ns = clock() if started_ns is None else started_ns
        self._device_clock = device_clock
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._open: dict[int, _OpenSpan] = {}
        self._pending: deque[tuple[_OpenSpan, Any, Any]] = deque()
        self._spans: deque[Span] = deque(maxlen=ring)
        self._marks: deque[Mark] = deque(maxlen=ring)
        self._undrained: deque[Span | Mark] | None = None
        self._stages: dict[tuple[str, str], StageAggregate] = {}
        self._delivery = DeliveryAggregate(self.started_ns, None if fps is None else Fraction(fps))
        self._window: tuple[int, int] | None = None
        self._count = 0

    @property
    def on_device(self) -> bool:
        """Whether spans are stamped by a device, and so known only once it has passed them."""
        return self._device_clock is not None

    # --- writing --------------------------------------------------------------------------------------------

    def span(
        self, stage: str, name: str, chunk: int | None = None, *, host: bool = False, **attrs: object
    ) -> AbstractContextManager[None]:
        """Measure the work inside the `with` block. `host=True`: by the host's clock even when there is a
        device.
        """
        return _OpenSpan(self, stage, name, chunk, host or self._device_clock is None, attrs)

    def mark(self, stage: str, name: str, chunk: int | None = None, **attrs: object) -> None:
        """Note an instant."""
        self._add_mark(Mark(stage, name, chunk, self.clock(), self.rank, attrs))

    def prompt(self, chunk: int, text: str = "") -> None:
        """A new prompt arrived just now; `chunk` is the first that will be made with it."""
        with self._lock:
            self._delivery.prompt(chunk, self.clock())
        self.mark("prompt", "prompt", chunk, text=text)

    def frames(self, chunk: int, count: int) -> None:
        """`count` pixel frames of `chunk` were handed on (to the encoder, the player, the caller) just
        now.
        """
        at = self.clock()
        with self._lock:
            self._delivery.deliver(chunk, count, at)
        self._add_mark(Mark("delivery", "frames", chunk, at, self.rank, {"count": count}))

    def _add_mark(self, mark: Mark) -> None:
        with self._lock:
            self._marks.append(mark)
            if self._undrained is not None:
                self._undrained.append(mark)

    def _enter(self, span: _OpenSpan) -> None:
        span.depth = depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        self._open[id(span)] = span
        if not span.host:
            assert self._device_clock is not None
            span.ticket = self._device_clock.record()
        span.start = self.clock()

    def _leave(self, span: _OpenSpan) -> None:
        end: Any = self.clock()
        if not span.host:
            assert self._device_clock is not None
            end = self._device_clock.record()
        self._thread.depth = span.depth
        self._open.pop(id(span), None)
        self._pending.append((span, span.start if span.host else span.ticket, end))
        if len(self._pending) >= PENDING:
            self.poll()

    # --- resolving ------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take over every finished span whose stamps are known by now. Cheap, never waits."""
        with self._lock:
            for _ in range(len(self._pending)):
                open_span, start, end = self._pending.popleft()
                stamps = (start, end) if open_span.host else self._resolve(start, end)
                if stamps is None:
                    self._pending.append((open_span, start, end))
                    continue
                self._add_span(
                    Span(
                        open_span.stage,
                        open_span.name,
                        open_span.chunk,
                        stamps[0],
                        stamps[1],
                        open_span.depth,
                        self.rank,
                        open_span.attrs,
                    )
                )

    def _resolve(self, start: Any, end: Any) -> tuple[int, int] | None:
        assert self._device_clock is not None
        return self._device_clock.resolve(start, end)

    def _add_span(self, span: Span) -> None:
        self._count += 1
        self._spans.append(span)
        if self._undrained is not None:
            self._undrained.append(span)
        key = (span.stage, span.rank)
        aggregate = self._stages.get(key)
        if aggregate is None:
            aggregate = self._stages[key] = StageAggregate()
        aggregate.add(span)
        if aggregate.unsettled:
            aggregate.settle(self._others(key))
        if span.chunk is not None:
            first, last = self._window or (span.start_ns, span.end_ns)
            self._window = (min(first, span.start_ns), max(last, span.end_ns))

    def _others(self, key: tuple[str, str]) -> tuple[Span, ...]:
        """The other stages' recent spans, for telling what a bubble waited for."""
        return tuple(span for other, stage in self._stages.items() if other != key for span in stage.recent)

    # --- many processes -------------------------------------------------------------------------------------

    def drain(self) -> list[Span | Mark]:
        """What was recorded since the last call, picklable, to be sent to the process that keeps the books.

        The first call starts the collection and returns what the ring still holds.
        """
        self.poll()
        with self._lock:
            batch: list[Span | Mark] = [*self._spans, *self._marks]
            if self._undrained is not None:
                batch = list(self._undrained)
            self._undrained = deque(maxlen=self._spans.maxlen)
        return batch

    def absorb(self, batch: Iterable[Span | Mark], offset_ns: int = 0) -> None:
        """Take over another process's batch; `offset_ns` is added to its times.

        Processes of one Linux machine share CLOCK_MONOTONIC: offset 0.
        """
        with self._lock:
            for item in batch:
                if isinstance(item, Mark):
                    self._add_mark(replace(item, at_ns=item.at_ns + offset_ns) if offset_ns else item)
                elif offset_ns:
                    self._add_span(
                        replace(item, start_ns=item.start_ns + offset_ns, end_ns=item.end_ns + offset_ns)
                    )
                else:
                    self._add_span(item)

    # --- reading --------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """The summary as of now."""
        self.poll()
        with self._lock:
            now, mean = self._delivery.rates()
            period, latency = self._delivery.spreads()
            window = self._window[1] - self._window[0] if self._window else 0
            return Stats(
                wall_s=(self.clock() - self.started_ns) / 1e9,
                chunks=self._delivery.chunks,
                frames=self._delivery.frames,
                fps_now=now,
                fps_mean=mean,
                time_to_first_frame_s=self._delivery.time_to_first_frame_s,
                frames_late=self._delivery.late,
                period=period,
                prompt_to_pixel=latency,
                spans_recorded=self._count,
                stages=tuple(
                    aggregate.summary(stage, rank, window, self._others((stage, rank)))
                    for (stage, rank), aggregate in self._stages.items()
                ),
            )

    def recent(self, seconds: float) -> list[Span]:
        """Outermost spans of the last `seconds`, oldest first, those still open included (they end now)."""
        self.poll()
        now = self.clock()
        since = now - round(seconds * 1e9)
        found: list[Span] = []
        with self._lock:
            for span in reversed(self._spans):
                if span.end_ns < since - LATE_NS:
                    break
                if span.end_ns >= since and span.depth == 0:
                    found.append(span)
        found.reverse()
        return [*found, *self._open_spans(now)]

    def _open_spans(self, now: int) -> list[Span]:
        return [
            Span(s.stage, s.name, s.chunk, s.start, max(now, s.start), s.depth, self.rank, s.attrs)
            for s in list(self._open.values())
            if s.depth == 0 and s.start is not None
        ]

    def write_stats(self, path: str | os.PathLike[str], settings: Mapping[str, object] | None = None) -> Path:
        """Write `stats()` as JSON with schema version, machine, versions and the run's `settings`.

        Raises `OutputError` when the place cannot be written.
        """
        from wanrt.telemetry.export import stats_document
        from wanrt.telemetry.files import write_json

        return write_json(path, stats_document(self.stats(), settings or {}))

    def write_trace(self, path: str | os.PathLike[str], settings: Mapping[str, object] | None = None) -> Path:
        """Write the kept spans and marks in Chrome's trace format (open in ui.perfetto.dev).

        Raises `OutputError` when the place cannot be written.
        """
        from wanrt.telemetry.export import trace_document
        from wanrt.telemetry.files import write_json

        self.poll()
        with self._lock:
            spans, marks, dropped = tuple(self._spans), tuple(self._marks), self._count - len(self._spans)
        document = trace_document(spans, marks, self.started_ns, dropped, settings or {})
        return write_json(path, document, indent=None)
