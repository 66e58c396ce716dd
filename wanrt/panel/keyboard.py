"""The terminal's keyboard, key by key, with its mode given back on every way out."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from wanrt.panel.editor import Event
from wanrt.panel.keys import KeyReader

ESCAPE_S = 0.05  # after which an escape with nothing behind it is the Escape key
POLL_S = 0.5  # between looks at who has the terminal
PASTE_ON, PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"  # bracketed paste: pasted text is marked as such
# Outlives this process when that is killed, which no handler survives: "taken" or "given" comes with each change.
GUARD = """while read -r line; do state=$line; done
if [ "$state" = taken ]; then stty "$0" <&1; printf '\\033[?2004l'; fi"""

Modes = list[Any]
log = logging.getLogger("wanrt.panel")


def keyboard_at(stdin: int | None = None) -> int | None:
    """The descriptor of a terminal to read keys from (default: standard input); None when it is no terminal."""
    try:
        descriptor = sys.stdin.fileno() if stdin is None else stdin
        return descriptor if os.isatty(descriptor) else None
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something without a descriptor
        return None


class Keyboard:
    """Hands what is typed to `take`, on a thread of its own, until `close`.

    The terminal sends keys at once and shows none by itself; Ctrl-C and Ctrl-Z work as ever. It has its own mode
    back while the process is stopped or in the background, after `close`, and, through a small process that waits
    for that, when this process is killed.

    Args:
        descriptor: of the terminal.
        take: is given keys and text; returns False when nobody wants them any more.
        resumed: the terminal has come back from a shell or another program, which has written to it.
    """

    def __init__(
        self, descriptor: int, take: Callable[[list[Event]], bool], resumed: Callable[[], None]
    ) -> None:
        self._terminal, self._take, self._resumed = descriptor, take, resumed
        self._saved: Modes = termios.tcgetattr(descriptor)
        self._guard = _guard(descriptor)
        self._lock = threading.RLock()
        self._taken, self._times_taken = False, 0
        self._closed = threading.Event()
        self._wake, self._waker = os.pipe()
        self._main = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGTSTP)
        if self._main and self._before is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._on_stop)
        self._hold()
        self._thread = threading.Thread(target=self._work, name="wanrt-keyboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the terminal back; safe to call twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        os.write(self._waker, b".")
        self._thread.join(5)
        self._give()
        if self._main and self._before is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._before)
        if self._guard is not None:
            assert self._guard.stdin
            self._guard.stdin.close()
            self._guard.wait()
        os.close(self._wake)
        os.close(self._waker)

    def _work(self) -> None:
        """Reads until nobody wants keys, or the terminal is gone."""
        keys = KeyReader()
        try:
            while not self._closed.is_set():
                wait = ESCAPE_S if keys.waiting else POLL_S
                ready, _, _ = select.select([self._terminal, self._wake], [], [], wait)
                if not self._hold():
                    self._closed.wait(POLL_S)
                    continue
                data = os.read(self._terminal, 65_536) if self._terminal in ready else b""
                if self._terminal in ready and not data:
                    break
                events = keys.feed(data) if data else keys.flush()
                if events and not self._take(events):
                    break
        except (OSError, termios.error) as error:
            log.debug("keyboard: %s", error)
        self._give()

    def _hold(self) -> bool:
        """Takes the terminal if this process is in its foreground; whether it has it."""
        with self._lock, _without_job_control():
            if os.tcgetpgrp(self._terminal) != os.getpgrp():
                self._taken = False
                return False
            lost = self._taken and termios.tcgetattr(self._terminal)[3] & termios.ICANON  # by SIGSTOP
            if not self._taken or lost:
                self._tell("taken")
                termios.tcsetattr(self._terminal, termios.TCSANOW, keywise(self._saved))
                os.write(self._terminal, PASTE_ON)
                self._taken = True
                if self._times_taken:
                    self._resumed()
                self._times_taken += 1
            return True

    def _give(self) -> None:
        """Its own mode to the terminal, unless it belongs to somebody else now."""
        with self._lock, _without_job_control(), contextlib.suppress(OSError, termios.error):
            if self._taken and os.tcgetpgrp(self._terminal) == os.getpgrp():
                os.write(self._terminal, PASTE_OFF)
                termios.tcsetattr(self._terminal, termios.TCSANOW, self._saved)
            self._taken = False
            self._tell("given")

    def _tell(self, state: str) -> None:
        if self._guard is not None and self._guard.stdin:
            with contextlib.suppress(OSError):  # somebody has killed it: then there is no net
                self._guard.stdin.write(f"{state}\n".encode())
                self._guard.stdin.flush()

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets a terminal in order; all goes on here after `fg`."""
        self._give()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._on_stop)


def keywise(modes: Modes) -> Modes:
    """Modes of a terminal that gives keys at once and shows none; signals, and everything else, as before."""
    characters = list(modes[6])
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    off = termios.ICANON | termios.ECHO | termios.IEXTEN  # IEXTEN: Ctrl-V and Ctrl-O are held back by it
    return [*modes[:3], modes[3] & ~off, *modes[4:6], characters]


@contextlib.contextmanager
def _without_job_control() -> Iterator[None]:
    """A process that goes to the background in the middle of a change must not be stopped by SIGTTOU for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _guard(terminal: int) -> subprocess.Popen[bytes] | None:
    """A shell in a session of its own, which no signal of this terminal reaches, waiting for this process's end."""
    try:
        saved = subprocess.run(["stty", "-g"], stdin=terminal, capture_output=True, text=True, check=True)
        return subprocess.Popen(
            ["sh", "-c", GUARD, saved.stdout.strip()],
            stdin=subprocess.PIPE,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        log.info("keyboard: a killed run would leave the terminal as it is (%s)", error)
        return None
