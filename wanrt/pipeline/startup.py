"""How a measurement starts: a line for each part on the way, and the seconds of each when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

OTHERS_NAMED = 3  # parts under way beside the one that a line is about
SAY_EVERY_S = 5.0  # how often a part that takes long is said again, with how much of it is done

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing."""


@dataclass
class Startup:
    """One start, told part by part; `heard` is a `Progress`.

    say: takes lines like `[0:05] loading transformer`, the form that a render without a terminal has. started_ns
    (`time.perf_counter_ns`): what the clock in them counts from. seconds: of every part that is done, by name; parts of
    other ranks as `mesh1: transformer`. Parts of different ranks overlap, so they do not add up to the whole.
    """

    say: Say = silent
    started_ns: int = field(default_factory=time.perf_counter_ns)
    seconds: dict[str, float] = field(default_factory=dict)
    _under_way: dict[str, None] = field(default_factory=dict)
    _said_s: float = 0.0

    def heard(self, part: str, seconds: float | None, fraction: float | None = None) -> None:
        """A part begins (`seconds` None; said again it is the same one, which gets on), or is done."""
        if seconds is not None:
            self._under_way.pop(part, None)
            self.seconds[part] = seconds
        elif part not in self._under_way or self._elapsed_s() - self._said_s >= SAY_EVERY_S:
            self._say_loading(part, fraction)
            self._under_way[part] = None

    def tell(self, text: str) -> None:
        """A line of its own, with the clock."""
        from wanrt.panel.words import clock_time

        self.say(f"[{clock_time(self._elapsed_s())}] {text}")

    def _say_loading(self, part: str, fraction: float | None) -> None:
        from wanrt.panel import LoadStep, Phase, Snapshot
        from wanrt.panel.plain import progress_line

        self._said_s = self._elapsed_s()
        others = [other for other in self._under_way if other != part]
        more = ", ..." if len(others) > OTHERS_NAMED else ""
        beside = f"beside {', '.join(others[:OTHERS_NAMED])}{more}" if others else ""
        step = LoadStep(part, "active", fraction, detail=beside)
        self.say(progress_line(Snapshot(phase=Phase.LOADING, elapsed_s=self._said_s, load=(step,))))

    def _elapsed_s(self) -> float:
        return (time.perf_counter_ns() - self.started_ns) / 1e9
