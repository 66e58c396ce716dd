"""The documents behind `--stats` and `--trace`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wanrt import __version__
from wanrt.telemetry.spans import Mark, Span
from wanrt.telemetry.stats import SCHEMA_VERSION, Stats

Event = dict[str, Any]


def stats_document(stats: Stats, settings: Mapping[str, object]) -> dict[str, object]:
    """`--stats`: {"schema", "wanrt", "machine", "settings", "stats"}; times in the unit their key ends
    with.
    """
    return {
        "schema": SCHEMA_VERSION,
        "wanrt": __version__,
        "machine": machine(),
        "settings": {key: _plain(value) for key, value in settings.items()},
        "stats": asdict(stats),
    }


def machine() -> dict[str, object]:
    """Platform, versions and devices. Torch is asked only when the process has it loaded already."""
    facts: dict[str, object] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in ("torch", "triton", "av", "numpy")},
        "devices": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plain(value: object) -> object:
    """`value` if JSON knows it, else its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value)


def trace_document(
    spans: Sequence[Span], marks: Sequence[Mark], origin_ns: int, dropped: int, settings: Mapping[str, object]
) -> dict[str, object]:
    """`--trace`, in the Trace Event Format's JSON object form, microseconds from the start of the recording.

    One process per rank, one thread per stage (a second one where a stage's spans overlap without nesting).
    Arrows lead from a chunk's latents to the work on its anchor, and from there to the next chunk.

    Source: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
    """
    names = dict.fromkeys([*(span.rank for span in spans), *(mark.rank for mark in marks)])
    ranks = {rank: i + 1 for i, rank in enumerate(names)}
    lanes = _Lanes(ranks)
    ordered = sorted(spans, key=lambda s: (s.start_ns, -s.end_ns))
    placed = [(span, lanes.place(span)) for span in ordered]
    events = [_complete(span, ranks[span.rank], tid, origin_ns) for span, tid in placed]
    events += [_instant(mark, ranks[mark.rank], lanes.of(mark.rank, mark.stage), origin_ns) for mark in marks]
    events += _arrows(placed, ranks, origin_ns)
    return {
        "traceEvents": [*lanes.names(), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "wanrt": __version__,
            "spans_dropped": dropped,
            "settings": {key: _plain(value) for key, value in settings.items()},
        },
    }


class _Lanes:
    """Thread ids: one per rank and stage, more where spans of one stage overlap without nesting."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._ranks = ranks
        self._tids: dict[tuple[str, str, int], int] = {}
        self._stacks: dict[int, list[int]] = {}

    def of(self, rank: str, stage: str, lane: int = 0) -> int:
        """The thread id of that lane."""
        return self._tids.setdefault((rank, stage, lane), len(self._tids) + 1)

    def place(self, span: Span) -> int:
        """The first lane in which `span` nests or follows; spans come sorted by start, longest first."""
        lane = 0
        while True:
            tid = self.of(span.rank, span.stage, lane)
            stack = self._stacks.setdefault(tid, [])
            while stack and stack[-1] <= span.start_ns:
                stack.pop()
            if not stack or stack[-1] >= span.end_ns:
                stack.append(span.end_ns)
                return tid
            lane += 1

    def names(self) -> list[Event]:
        """Metadata events that name and order processes and threads."""
        events: list[Event] = []
        for rank, pid in self._ranks.items():
            events.append(_meta("process_name", pid, 0, name=f"wanrt {rank}"))
            events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
        for (rank, stage, lane), tid in self._tids.items():
            name = stage if lane == 0 else f"{stage} ({lane + 1})"
            events.append(_meta("thread_name", self._ranks[rank], tid, name=name))
            events.append(_meta("thread_sort_index", self._ranks[rank], tid, sort_index=tid))
        return events


def _meta(kind: str, pid: int, tid: int, **args: object) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _micro(ns: int, origin_ns: int) -> float:
    return round((ns - origin_ns) / 1000, 3)


def _complete(span: Span, pid: int, tid: int, origin_ns: int) -> Event:
    args = {"chunk": span.chunk, **{k: _plain(v) for k, v in span.attrs.items()}}
    start, end = _micro(span.start_ns, origin_ns), _micro(span.end_ns, origin_ns)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.stage,
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": round(end - start, 3),
        "args": args,
    }


def _instant(mark: Mark, pid: int, tid: int, origin_ns: int) -> Event:
    args = {"chunk": mark.chunk, **{k: _plain(v) for k, v in mark.attrs.items()}}
    return {
        "ph": "i",
        "s": "t",
        "name": mark.name,
        "cat": mark.stage,
        "pid": pid,
        "tid": tid,
        "ts": _micro(mark.at_ns, origin_ns),
        "args": args,
    }


def _arrows(placed: Iterable[tuple[Span, int]], ranks: Mapping[str, int], origin_ns: int) -> list[Event]:
    """Flow events: last mesh span of a chunk -> first stage-0 span after it; the anchor's span -> the next
    chunk.
    """
    mesh: dict[int, list[tuple[Span, int]]] = {}
    stage0: dict[int, list[tuple[Span, int]]] = {}
    for span, tid in placed:
        table = mesh if span.stage.startswith("mesh") else stage0 if span.stage.startswith("stage0") else None
        if table is not None and span.chunk is not None and span.depth == 0:
            table.setdefault(span.chunk, []).append((span, tid))
    events: list[Event] = []
    for chunk, work in mesh.items():
        last = max(work, key=lambda item: item[0].end_ns)
        after = [item for item in stage0.get(chunk, []) if item[0].start_ns >= last[0].end_ns]
        if after:
            events += _arrow(2 * chunk, "latents", last, after[0], ranks, origin_ns)
        following = mesh.get(chunk + 1)
        before = [item for item in after if following and item[0].end_ns <= following[0][0].start_ns]
        if following and before:
            latest = max(before, key=lambda item: item[0].end_ns)
            events += _arrow(2 * chunk + 1, "anchor", latest, following[0], ranks, origin_ns)
    return events


def _arrow(
    number: int,
    name: str,
    tail: tuple[Span, int],
    head: tuple[Span, int],
    ranks: Mapping[str, int],
    origin_ns: int,
) -> list[Event]:
    (one, one_tid), (two, two_tid) = tail, head
    common = {"name": name, "cat": "flow", "id": number}
    # A flow event binds to the slice that encloses it, so its start lies just inside the end of the first
    # span.
    start = max(_micro(one.start_ns, origin_ns), _micro(one.end_ns, origin_ns) - 0.001)
    return [
        {"ph": "s", "pid": ranks[one.rank], "tid": one_tid, "ts": round(start, 3), **common},
        {
            "ph": "f",
            "bp": "e",
            "pid": ranks[two.rank],
            "tid": two_tid,
            "ts": _micro(two.start_ns, origin_ns),
            **common,
        },
    ]
