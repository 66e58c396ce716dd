"""What commands share: the panel's mode, and log lines that go through the panel while it is up."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.panel import Observer  # type: ignore[attr-defined]

log = logging.getLogger("wanrt")


def panel_mode(*, quiet: bool, plain: bool, json_progress: bool) -> str:
    """The one mode that the flags ask for; "auto" without any. Raises UsageError for two at once."""
    asked = {"quiet": quiet, "plain": plain, "json": json_progress}
    chosen = [mode for mode, given in asked.items() if given]
    if len(chosen) > 1:
        raise UsageError("got more than one of --quiet, --plain and --json-progress: choose one")
    return chosen[0] if chosen else "auto"


class _ToObserver(logging.Handler):
    """Sends log lines to the panel, which alone may draw on the terminal while it is up."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def emit(self, record: logging.LogRecord) -> None:
        self._observer.log(self.format(record))


@contextmanager
def observing(mode: str, notes: Sequence[str] = ()) -> Iterator[Observer]:
    """An observer in `mode`; `notes` and whatever is logged inside go through it. Always closed."""
    from wanrt.panel import make_observer  # type: ignore[attr-defined]

    observer = make_observer(mode, sys.stderr)
    handlers, log.handlers[:] = list(log.handlers), [_ToObserver(observer)]
    try:
        for note in notes:
            observer.log(f"note: {note}")
        yield observer
    finally:
        log.handlers[:] = handlers
        observer.close()
