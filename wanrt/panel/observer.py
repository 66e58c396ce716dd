"""Which observer a run gets, and what happens when it fails."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol, TextIO, TypeVar

from wanrt.errors import UsageError
from wanrt.panel.plain import JsonLines, PlainLines, QuietLines
from wanrt.panel.snapshot import Snapshot, Summary, Typed

Mode = Literal["auto", "panel", "plain", "json", "quiet"]
MODES: tuple[Mode, ...] = ("auto", "panel", "plain", "json", "quiet")
T = TypeVar("T")

logger = logging.getLogger("wanrt.panel")


class Observer(Protocol):
    """Whoever watches a run. No method may block for long; all may be called from any thread."""

    def update(self, snapshot: Snapshot) -> None:
        """Take the newest state; as often as wanted."""

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Show one line, lasting."""

    def typing(self, typed: Typed) -> bool:
        """Show the input line as it is now; whether its user can see it."""

    def close(self, summary: Summary | None = None) -> None:
        """The run is over; nothing is called after this."""


def make_observer(
    mode: Mode = "auto",
    stderr: TextIO | None = None,
    *,
    env: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Observer:
    """The observer for `mode`, writing to `stderr` (default: the process's).

    auto: the panel on a terminal that can move its cursor, else plain lines. NO_COLOR (any value but empty):
    no colours, in the panel too. TERM=dumb or unset: plain lines. `panel` asked for where it cannot be drawn
    gives plain lines and says so. An observer that fails is replaced by plain lines, and these by silence;
    the failure is logged, the run goes on.

    Raises `UsageError` for an unknown mode.
    """
    stream = sys.stderr if stderr is None else stderr
    env = os.environ if env is None else env
    if mode not in MODES:
        raise UsageError(f"progress mode {mode!r}: expected one of {', '.join(MODES)}")
    plain = PlainLines(stream, clock=clock)
    if mode == "json":
        return SafeObserver(JsonLines(stream, clock=clock), plain)
    if mode == "quiet":
        return SafeObserver(QuietLines(stream, clock=clock), None)
    obstacle = "asked for" if mode == "plain" else why_not_live(stream, env)
    if obstacle:
        log = logger.warning if mode == "panel" else logger.debug
        log("plain lines instead of the panel: %s", obstacle)
        return SafeObserver(plain, None)
    return SafeObserver(_live(stream, env, clock), plain)


def why_not_live(stream: TextIO, env: Mapping[str, str]) -> str | None:
    """Why `stream` cannot show the panel, or None when it can."""
    try:
        if not stream.isatty():
            return "stderr is not a terminal"
    except ValueError:
        return "stderr is closed"
    term = env.get("TERM", "")
    return f"TERM is {term or 'not set'}" if term in ("", "dumb", "unknown") else None


def _live(stream: TextIO, env: Mapping[str, str], clock: Callable[[], float]) -> Observer:
    from rich.console import Console

    from wanrt.panel.live import LivePanel

    console = Console(file=stream, force_terminal=True, _environ=env, no_color=bool(env.get("NO_COLOR")))
    return LivePanel(
        stream,
        size=lambda: terminal_size(stream),
        clock=clock,
        console=console,
        foreground=lambda: in_foreground(stream),
    )


def in_foreground(stream: TextIO) -> bool:
    """Whether this process's group has the terminal behind `stream`; True when that is not its own terminal."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return True


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal behind `stream`; 80x24 when it does not say."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        size = shutil.get_terminal_size()
    return (size.columns or 80, size.lines or 24)


class SafeObserver:
    """An observer that never harms the run: when `first` fails, its error is logged and `then` takes over.

    Without `then`, or when that fails too (the terminal is gone), the rest is silence.
    """

    def __init__(self, first: Observer, then: Observer | None) -> None:
        self._now: Observer | None = first
        self._then = then

    def update(self, snapshot: Snapshot) -> None:
        """Pass the snapshot on."""
        self._call(lambda observer: observer.update(snapshot))

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Pass the line on."""
        self._call(lambda observer: observer.log(line, level))

    def typing(self, typed: Typed) -> bool:
        """Pass the line on."""
        return bool(self._call(lambda observer: observer.typing(typed)))

    def close(self, summary: Summary | None = None) -> None:
        """Pass the end on."""
        self._call(lambda observer: observer.close(summary))

    def _call(self, what: Callable[[Observer], T]) -> T | None:
        while self._now is not None:
            failed = self._now
            try:
                return what(failed)
            except Exception as error:
                self._now, self._then = self._then, None
                self._report(failed, error)
        return None

    def _report(self, failed: Observer, error: Exception) -> None:
        """Tell the log, and the observer that takes over, without letting either fail the run."""
        name = type(failed).__name__
        words = f"{name} failed ({type(error).__name__}: {error}); the run goes on"
        logger.debug(words, exc_info=error)
        if self._now is not None:
            self._call(lambda observer: observer.log(f"{words} with plain lines", logging.WARNING))


class LogToObserver(logging.Handler):
    """Logging handler that shows records above the panel."""

    def __init__(self, observer: Observer, level: int = logging.INFO) -> None:
        super().__init__(level)
        self._observer = observer

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self._observer.log(record.getMessage(), record.levelno)


@contextmanager
def logging_to(observer: Observer, level: int = logging.WARNING) -> Iterator[None]:
    """Inside the block the log of wanrt, and Python's warnings, appear above the panel instead of through
    it.
    """
    handler = LogToObserver(observer, level)
    loggers = [logging.getLogger("wanrt"), logging.getLogger("py.warnings")]
    before = [log.propagate for log in loggers]
    logging.captureWarnings(True)
    for log in loggers:
        log.addHandler(handler)
        log.propagate = False
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for log, propagate in zip(loggers, before, strict=True):
            log.removeHandler(handler)
            log.propagate = propagate
