"""What every rank's process does besides its task: its log goes up its pipe, and so do its last words."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

log = logging.getLogger("wanrt.parallel")


@dataclass(frozen=True)
class Line:
    """A line of a rank's log."""

    level: int
    text: str


@dataclass(frozen=True)
class Failed:
    """A rank's last words."""

    text: str


def words_of(error: BaseException) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def leave(code: int) -> NoReturn:
    """Ends a rank's process, not through the interpreter's end: libraries tear down slowly there, and hang where a
    peer is dead.
    """
    os._exit(code)


@contextlib.contextmanager
def logging_into(pipe: Connection) -> Iterator[None]:
    """The log of wanrt goes up the pipe."""

    class ToParent(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(OSError):
                pipe.send(Line(record.levelno, record.getMessage()))

    logger = logging.getLogger("wanrt")
    logger.handlers[:] = [ToParent()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield


def die_with_parent() -> None:
    """Linux: SIGKILL when the parent's main thread ends, however it ends."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1  # <linux/prctl.h>
    try:
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):
        log.debug("no prctl here: a rank ends with its pipe")
