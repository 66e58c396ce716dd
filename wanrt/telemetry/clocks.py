"""Clocks a span can be stamped with: the host's, or a CUDA stream's, both in nanoseconds of one host
clock.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# elapsed_time() is a float32 of milliseconds: 16 s after the base event its step is 1 us, so move the base
# that often.
REBASE_MS = 16_000.0


class Clock(Protocol):
    """A host clock in nanoseconds, monotonic, of arbitrary origin."""

    def __call__(self) -> int:
        """Nanoseconds now."""
        ...


class DeviceClock(Protocol):
    """Stamps that a device fills in later: `record` now, `resolve` when the device has passed it."""

    def record(self) -> Any:
        """A stamp of this point in the current stream's work."""
        ...

    def resolve(self, start: Any, end: Any) -> tuple[int, int] | None:
        """Host nanoseconds of both stamps, or None while the device has not reached `end`. Never waits."""
        ...


host_clock: Clock = time.perf_counter_ns


class CudaClock:
    """CUDA events on the current stream, mapped on the host's clock without ever waiting for the device in a
    chunk.

    One pair (event, host time) is taken at construction, with a synchronisation. Host and device oscillators
    then drift apart by some 10 us a second; the mapping is kept true by causality alone: no event runs before
    the host recorded it nor after the host saw it done, and a violation shifts the base by as much.
    A device clock that runs fast is thus held to a few milliseconds, one that runs slow to microseconds.
    """

    def __init__(self, device: torch.device | str, clock: Clock = host_clock) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._clock = clock
        self._base, self._base_ns = self._calibrate()

    def _calibrate(self, tries: int = 5) -> tuple[Any, int]:
        """Pair of event and host time; of `tries`, the one whose host bracket is the narrowest."""
        best: tuple[int, Any, int] | None = None
        for _ in range(tries):
            self._torch.cuda.synchronize(self._device)
            before = self._clock()
            event = self._event()
            event.synchronize()
            after = self._clock()
            if best is None or after - before < best[0]:
                best = (after - before, event, (before + after) // 2)
        assert best is not None
        return best[1], best[2]

    def _event(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def record(self) -> tuple[Any, int]:
        """An event on the current stream, and the host time just before it was recorded."""
        before = self._clock()
        return self._event(), before

    def resolve(self, start: tuple[Any, int], end: tuple[Any, int]) -> tuple[int, int] | None:
        """Host nanoseconds of both events, or None while `end` has not run."""
        if not end[0].query():
            return None
        seen = self._clock()
        start_ns, end_ns = self._map(start[0]), self._map(end[0])
        shift = self._causal_shift(start_ns - start[1], seen - end_ns)
        self._base_ns += shift
        start_ns, end_ns = start_ns + shift, end_ns + shift
        if self._base.elapsed_time(end[0]) > REBASE_MS:
            self._base, self._base_ns = end[0], end_ns
        return start_ns, max(start_ns, end_ns)

    def _map(self, event: Any) -> int:
        return self._base_ns + round(self._base.elapsed_time(event) * 1e6)

    @staticmethod
    def _causal_shift(after_record: int, before_seen: int) -> int:
        """Shift that repairs a stamp earlier than its recording (negative first slack) or later than its
        sighting.
        """
        if after_record < 0:
            return -after_record
        return min(before_seen, 0)


def clock_for(device: torch.device | str | None) -> DeviceClock | None:
    """The device clock of `device`: CUDA events for a CUDA device, None (the host's clock) for anything
    else.
    """
    if device is None or not str(device).startswith("cuda"):
        return None
    return CudaClock(device)
