"""A run that may be asked to end: checked between passes, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wanrt.errors import WanrtError


class CancelledError(WanrtError):
    """The run was asked to end. Exit code 128 + signal, as shells count it: 129 for SIGHUP, 130 for SIGINT, 143 for
    SIGTERM.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum


class StoppedError(WanrtError):
    """The run was told to stop before it had made anything: no failure, exit code 0."""

    exit_code = 0


class Cancel:
    """Asked from anywhere (a signal handler, another thread), obeyed at the next `check`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._signum: int = signal.SIGINT
        self.at_once = False

    def ask(self, signum: int = signal.SIGINT) -> None:
        """Ask the run to end as if `signum` had arrived."""
        self._signum = signum
        self._event.set()

    @property
    def asked(self) -> bool:
        """Whether somebody asked."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises `CancelledError` once somebody asked."""
        if self._event.is_set():
            raise CancelledError(self._signum)

    @contextmanager
    def raising_at_once(self) -> Iterator[None]:
        """Inside the block a signal raises where it finds the main thread: for long work that leaves nothing behind
        when it is broken off, such as an import.
        """
        self.at_once = True
        try:
            self.check()
            yield
            self.check()
        finally:
            self.at_once = False
