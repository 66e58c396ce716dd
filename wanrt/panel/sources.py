"""Parts of a snapshot that are read off a recorder and the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import psutil

from wanrt.panel.snapshot import Block, Memory, StageRow
from wanrt.telemetry import Recorder, Span, StageStats, Stats


def stage_rows(recorder: Recorder, stats: Stats, seconds: float = 60.0) -> tuple[StageRow, ...]:
    """One row per stage and rank, with the busy blocks of the last `seconds`. Times are as of now.

    The rank is named only where several ranks have the same stage. Stages without a chunk (loading) are left
    out.
    """
    recent = [span for span in recorder.recent(seconds) if span.chunk is not None]
    now = recorder.clock()
    shared = [s.stage for s in stats.stages]
    rows = []
    for stage in sorted(stats.stages, key=_place):
        spans = [s for s in recent if (s.stage, s.rank) == (stage.stage, stage.rank)]
        if not spans and stage.busy_s == 0:
            continue
        newest = max(spans, key=lambda s: s.end_ns, default=None)
        rows.append(
            StageRow(
                name=_name(stage) if shared.count(stage.stage) > 1 else stage.stage,
                busy_share=stage.busy_share,
                bubble_ms=stage.bubble.p50_ms if stage.stage.startswith("mesh") else None,
                last=newest.name if newest else "",
                blocks=_blocks(spans, now),
                chunk=newest.chunk if newest else None,
            )
        )
    return tuple(rows)


def delay(recorder: Recorder, stats: Stats) -> float:
    """Seconds after which spans are known: other ranks send theirs with each chunk, a device's come step by step."""
    period = (stats.period.p50_ms or 0.0) / 1e3
    if any(stage.rank != recorder.rank for stage in stats.stages):
        return 1.25 * period
    return 0.25 * period if recorder.on_device else 0.0


def _name(stage: StageStats) -> str:
    """`mesh0`, or `decode vae1` where the rank's name does not say the stage."""
    return stage.rank if stage.rank.startswith(stage.stage) else f"{stage.stage} {stage.rank}"


def _place(stage: StageStats) -> tuple[int, str]:
    """Mesh first, then stage 0, then what comes after them; ranks in order."""
    order = ("mesh", "stage0")
    return (order.index(stage.stage) if stage.stage in order else len(order), stage.rank)


def _blocks(spans: Iterable[Span], now: int, join_s: float = 1e-3) -> tuple[Block, ...]:
    """Spans as seconds before `now`; neighbours less than a millisecond apart are one block."""
    blocks: list[Block] = []
    for span in sorted(spans, key=lambda s: s.start_ns):
        start, end = min(0.0, (span.start_ns - now) / 1e9), min(0.0, (span.end_ns - now) / 1e9)
        if blocks and start - blocks[-1][1] < join_s:
            blocks[-1] = (blocks[-1][0], max(end, blocks[-1][1]))
        else:
            blocks.append((start, end))
    return tuple(blocks)


def memory_now() -> Memory:
    """Memory of this process and its children, and of the fullest CUDA device if the process uses one.

    Reads /proc and asks the driver: call it once or twice a second, not per frame.
    """
    torch = _torch()
    used = total = None
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        infos = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
        used, total = max(((size - free, size) for free, size in infos), key=lambda pair: pair[0] / pair[1])
    return Memory(rss=_tree_rss(), device_used=used, device_total=total)


def _torch() -> Any:
    """torch if it is imported, not if it is being imported: the panel is up while the run imports it."""
    torch = sys.modules.get("torch")
    spec = getattr(torch, "__spec__", None)
    return None if spec is None or getattr(spec, "_initializing", False) else torch


def _tree_rss() -> int:
    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # gone meanwhile
            continue
    return total
