"""How a start is told: part by part, each from when it begins, with how much of it is done, to how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Done = Callable[[int, int], None]  # so much of so much is done


class Progress(Protocol):
    """Hears how a start goes."""

    def __call__(self, part: str, seconds: float | None, fraction: float | None = None) -> None:
        """`part` took so many seconds, or None: it is under way; then, if that is known, the fraction done, 0..1."""


def unheard(part: str, seconds: float | None, fraction: float | None = None) -> None:
    """A `Progress` that nobody listens to."""


@contextmanager
def timed(progress: Progress, part: str) -> Iterator[Done]:
    """Tells `progress` that `part` begins, and after the block how long it took.

    What the block is given takes how much is done; `progress` hears of it once a percent.
    """
    percent = 0

    def done(count: int, of: int) -> None:
        nonlocal percent
        if (now := 100 * count // of) > percent:
            percent = now
            progress(part, None, count / of)

    progress(part, None)
    started = time.perf_counter()
    yield done
    progress(part, time.perf_counter() - started)
