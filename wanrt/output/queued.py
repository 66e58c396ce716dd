"""A sink on a thread of its own behind a bounded queue, so that encoding runs beside generation."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import OutputError

from .sink import Sink

if TYPE_CHECKING:
    from .frames import Pixels

log = logging.getLogger("wanrt.output")

STALL_SECONDS = 120.0  # a sink that takes no frame for this long is given up


@dataclass(frozen=True)
class QueueState:
    """What the panel shows of an encoder.

    Attributes:
        depth: frames waiting.
        capacity: frames that may wait before `write` blocks.
        frames_in: frames given to `write`.
        frames_out: frames that the sink has taken.
        lag: seconds since the oldest waiting or unfinished frame was given; 0 when none is.
        blocked: seconds that `write` has waited for room, all in all (back-pressure).
        busy: seconds that the sink has worked.
    """

    depth: int
    capacity: int
    frames_in: int
    frames_out: int
    lag: float
    blocked: float
    busy: float


@dataclass(frozen=True)
class _Item:
    block: Pixels | None  # None: a chunk boundary
    frames: int
    given: float


class QueuedSink(Sink):
    """Runs `sink` on a thread. `write` returns at once while fewer than `capacity` frames wait, and blocks
    otherwise.

    When the sink fails, it is aborted on the spot (what it wrote stays playable), and the failure is raised
    as OutputError by the next `write` (a blocked one wakes at once), `flush_chunk` or `finish`, and by every
    later one. The wrapped sink is only ever touched by the thread.

    Args:
        sink: any sink.
        capacity: frames that may wait; 48 are four chunks. A larger block is taken when the queue is empty.
        stall_seconds: how long `write`, `finish` and `abort` wait for a sink that makes no progress.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        sink: Sink,
        capacity: int = 48,
        *,
        stall_seconds: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec, self.pixel_format = sink.spec, sink.pixel_format
        self._sink, self._capacity, self._stall, self._clock = sink, capacity, stall_seconds, clock
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._current: _Item | None = None
        self._closing = ""  # then "finish" or "abort"
        self._done = False
        self._error: OutputError | None = None
        self._result: Path | None = None
        self._depth = self._frames_out = 0
        self._blocked = self._busy = 0.0
        self._progress = clock()
        self._thread = threading.Thread(target=self._work, name="wanrt-output", daemon=True)
        self._thread.start()

    @property
    def state(self) -> QueueState:
        """Depth, lag and back-pressure now."""
        with self._changed:
            oldest = self._current or (self._items[0] if self._items else None)
            return QueueState(
                depth=self._depth,
                capacity=self._capacity,
                frames_in=self.frames_written,
                frames_out=self._frames_out,
                lag=self._clock() - oldest.given if oldest else 0.0,
                blocked=self._blocked,
                busy=self._busy,
            )

    def write(self, pixels: Pixels) -> None:
        """Queue frames; blocks while the queue is full.

        Frames on a device are converted and fetched from the caller's stream, without a wait; frames in host
        memory are converted by the thread.
        """
        block = pixels
        if getattr(pixels, "is_cuda", False):
            from .frames import to_block

            block = to_block(pixels, self.spec, self.pixel_format)
        self._put(_Item(block, len(block), self._clock()))
        self.frames_written += len(block)

    def flush_chunk(self) -> None:
        """Queue a chunk boundary."""
        self._put(_Item(None, 0, self._clock()))

    def finish(self) -> Path:
        """Let the sink take what is queued, finish it, return its path."""
        self._close("finish")
        if self._error:
            raise OutputError(str(self._error)) from self._error
        assert self._result is not None
        return self._result

    def abort(self) -> Path | None:
        """Drop what is queued, abort the sink, return what it kept."""
        self._close("abort")
        return self._result

    # the producer's side

    def _put(self, item: _Item) -> None:
        with self._changed:
            started = self._clock()
            self._wait(lambda: self._has_room(item))
            self._blocked += self._clock() - started
            if self._error:
                raise OutputError(str(self._error)) from self._error
            if self._closing:
                raise OutputError("output: written to after it was closed")
            self._items.append(item)
            self._depth += item.frames
            self._changed.notify_all()

    def _has_room(self, item: _Item) -> bool:
        return (
            self._done
            or bool(self._closing)
            or not self._depth
            or self._depth + item.frames <= self._capacity
        )

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait, holding the lock, until `ready`; give up on a sink without progress."""
        started = self._clock()
        while not ready():
            left = max(self._progress, started) + self._stall - self._clock()
            if left <= 0:
                raise OutputError(
                    f"output: no frame taken for {self._stall:g} s; is the disk or the network stuck?"
                )
            self._changed.wait(min(left, 1.0))

    def _close(self, how: str) -> None:
        with self._changed:
            self._closing = self._closing or how
            if how == "abort":
                self._items.clear()
                self._depth = 0
            self._changed.notify_all()
            self._wait(lambda: self._done)
        self._thread.join()

    # the thread's side

    def _work(self) -> None:
        try:
            while item := self._next():
                self._handle(item)
            self._result = self._sink.finish() if self._closing == "finish" else self._sink.abort()
        except Exception as error:
            self._fail(error)
        finally:
            with self._changed:
                self._done = True
                self._current = None
                self._items.clear()
                self._depth = 0
                self._changed.notify_all()

    def _next(self) -> _Item | None:
        """The oldest item; None when the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closing)
            self._current = self._items.popleft() if self._items else None
            return self._current

    def _handle(self, item: _Item) -> None:
        started = self._clock()
        if item.block is None:
            self._sink.flush_chunk()
        else:
            self._sink.write(item.block)
        with self._changed:
            self._current = None
            self._depth = max(0, self._depth - item.frames)
            self._frames_out += item.frames
            self._progress = self._clock()
            self._busy += self._progress - started
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, OutputError):
            log.debug("output failed", exc_info=error)
        message = str(error) or type(error).__name__
        try:
            kept = self._sink.abort()
        except Exception as second:
            log.warning("closing the output after a failure failed too: %s", second)
            kept = None
        if kept and str(kept) not in message:
            message += f"; what was written plays: {kept}"
        self._result = kept
        self._error = OutputError(message)
