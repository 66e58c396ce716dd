"""What is recorded: spans, marks, and the union of intervals that busy time is made of."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work: `[start_ns, end_ns]` on the host's monotonic clock (`time.perf_counter_ns`).

    `stage` is a track ("mesh", "stage0", "encoder"), `name` the work ("context", "step", "anchor-decode"),
    `chunk` the chunk it belongs to (None: loading, warm-up), `depth` how many spans of the same thread
    enclose it, `rank` the process that did it.
    """

    stage: str
    name: str
    chunk: int | None
    start_ns: int
    end_ns: int
    depth: int = 0
    rank: str = "main"
    attrs: Mapping[str, object] = field(default_factory=dict)

    @property
    def duration_ns(self) -> int:
        """Length in nanoseconds."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class Mark:
    """An instant: a prompt that arrived, frames delivered, a scene that began."""

    stage: str
    name: str
    chunk: int | None
    at_ns: int
    rank: str = "main"
    attrs: Mapping[str, object] = field(default_factory=dict)


class IntervalUnion:
    """Length of the union of intervals that arrive roughly in order, in bounded memory.

    Nested spans arrive inner first, so a later interval may start before an earlier one; only the newest
    `keep` disjoint intervals can still be extended, older ones are counted and forgotten.
    """

    def __init__(self, keep: int = 256) -> None:
        self._keep = keep
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._forgotten = 0
        self._horizon: int | None = None

    def add(self, start: int, end: int) -> None:
        """Join `[start, end]` into the union; the part older than what is still kept is ignored."""
        if self._horizon is not None:
            start = max(start, self._horizon)
        if end <= start:
            return
        first = bisect.bisect_left(self._ends, start)
        last = bisect.bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        while len(self._starts) > self._keep:
            self._horizon = self._ends.pop(0)
            self._forgotten += self._horizon - self._starts.pop(0)

    @property
    def total(self) -> int:
        """Length of the union so far, in the unit of the intervals."""
        return self._forgotten + sum(self._ends) - sum(self._starts)


def attribute_gap(start: int, end: int, spans: Iterable[Span]) -> dict[str, int]:
    """Who was at work during the gap `[start, end]`: nanoseconds by "stage/name", the innermost span of each
    stage.

    Time in which no span was open is listed as "unrecorded" (queues, transfers, Python).
    """
    inside = [s for s in spans if s.start_ns < end and s.end_ns > start]
    cuts = sorted({start, end, *(min(max(t, start), end) for s in inside for t in (s.start_ns, s.end_ns))})
    shares: dict[str, int] = {}
    for left, right in itertools.pairwise(cuts):
        innermost: dict[str, Span] = {}
        for span in inside:
            if span.start_ns <= left and span.end_ns >= right:
                best = innermost.get(span.stage)
                innermost[span.stage] = span if best is None or span.depth >= best.depth else best
        labels = [f"{s.stage}/{s.name}" for s in innermost.values()] or ["unrecorded"]
        for label in labels:
            shares[label] = shares.get(label, 0) + right - left
    return shares
