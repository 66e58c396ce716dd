"""Bars in eighths of a character."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from wanrt.panel.snapshot import Block


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters of a panel. eighths: filled from the left, 0 to 8 of 8."""

    eighths: str
    line: str
    bar: str
    half: str
    done: str
    failed: str
    waiting: str
    stopped: str
    arrow: str
    ellipsis: str
    full: str
    empty: str
    warning: str
    spinner: str
    reversible: bool


UNICODE = Glyphs(
    eighths=" ▏▎▍▌▋▊▉█",
    line="─",
    bar="━",
    half="╸",
    done="✓",
    failed="✗",
    waiting="○",
    stopped="■",
    arrow="→",
    ellipsis="…",
    full="▮",
    empty="▯",
    warning="▲",
    spinner="⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏",
    reversible=True,
)
ASCII = Glyphs(
    eighths="    #####",
    line="-",
    bar="=",
    half="=",
    done="+",
    failed="x",
    waiting=".",
    stopped="#",
    arrow="->",
    ellipsis="...",
    full="#",
    empty=".",
    warning="!",
    spinner="|/-\\",
    reversible=False,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One character of a moving bar: how many eighths are busy, and whether they lie at its right edge."""

    eighths: int
    right: bool = False


def coverage(blocks: Iterable[Block], window: float, width: int) -> list[Cell]:
    """The last `window` seconds as `width` cells, oldest first; blocks are seconds before now, all negative
    or 0.

    Every cell shows as much ink as time was busy in it, to an eighth, at the edge where most of it lies. A
    sliver of work stays visible as one eighth.
    """
    step = window / width
    busy = [0.0] * width
    moment = [0.0] * width
    for start, end in blocks:
        low, high = (max(start, -window) + window) / step, (min(end, 0.0) + window) / step
        for index in range(int(low), min(width, int(high) + 1)):
            left, right = max(low, index), min(high, index + 1)
            if right > left:
                busy[index] += right - left
                moment[index] += (right - left) * ((left + right) / 2 - index)
    return [_cell(b, m) for b, m in zip(busy, moment, strict=True)]


def _cell(busy: float, moment: float) -> Cell:
    eighths = min(8, round(busy * 8))
    if eighths == 0 and busy > 1 / 32:
        eighths = 1
    return Cell(eighths, right=bool(0 < eighths < 8 and moment / busy > 0.5))


def runs(cells: Iterable[Cell], glyphs: Glyphs) -> list[tuple[str, str]]:
    """Cells as (kind, text) runs. Kinds: "idle", "busy", and "reversed": busy ink shown by swapping the
    colours.

    Unicode has blocks that fill from the left only; one that fills from the right is its complement,
    reversed.
    """
    drawn = (_draw(cell, glyphs) for cell in cells)
    return [
        (kind, "".join(text for _, text in group)) for kind, group in groupby(drawn, key=lambda item: item[0])
    ]


def _draw(cell: Cell, glyphs: Glyphs) -> tuple[str, str]:
    if cell.eighths == 0:
        return "idle", glyphs.line
    if cell.right and glyphs.reversible:
        return "reversed", glyphs.eighths[8 - cell.eighths]
    drawn = glyphs.eighths[cell.eighths]
    return ("busy", drawn) if drawn.strip() else ("idle", glyphs.line)


def progress(share: float, width: int, glyphs: Glyphs) -> tuple[str, str]:
    """A bar of `width` characters in half-character steps: (done, to do)."""
    halves = min(2 * width, max(0, int(share * 2 * width)))
    done = glyphs.bar * (halves // 2) + (glyphs.half if halves % 2 else "")
    return done, (glyphs.bar if glyphs.reversible else "-") * (width - len(done))


WINDOWS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)


def nice_window(period_s: float | None, periods: float = 8) -> float:
    """The round number of seconds that shows nearest to `periods` chunks; 10 when the period is unknown."""
    if not period_s:
        return 10.0
    return float(min(WINDOWS, key=lambda s: abs(math.log(s / (period_s * periods)))))
