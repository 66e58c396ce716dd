"""Rank processes: started or found, heard, and never left behind.

Stage 0's process starts the others and keeps a pipe to each, or takes those that torchrun started, with a connection
to each (`wanrt.parallel.crew`). Down the pipe go commands; up come `Ready`, log lines, recorded spans and, when a
rank fails, its last words. A pipe that closes is the end: a rank whose parent dies gets SIGKILL from the kernel, a
parent whose rank dies hears of it at the next `check`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from wanrt.errors import RunError
from wanrt.parallel.member import Failed, Line
from wanrt.parallel.reserve import Prepared, Reserve, Task

log = logging.getLogger("wanrt.parallel")

LIBRARY = "PyTorch"  # what a process imports first, and on most machines the slowest part of its start
LAST_LINES = 5
SETTLE_S = 1.0  # after a failure: how long to wait for the other ranks' exits, to name the first cause
START_S = (
    300.0  # how long a process may take to be there: torch from a cold disk, beside others that do the same
)
GOODBYE_S = 5.0  # how long a rank may take to end before it is killed


@dataclass(frozen=True)
class Ready:
    """A rank is loaded and waits for work. `detail`: in words, for the log."""

    detail: str = ""


@dataclass(frozen=True)
class Loading:
    """A rank loads `part`; `seconds` it took, None while it is under way; then the `fraction` that is done, 0..1, if
    that is known.
    """

    part: str
    seconds: float | None
    fraction: float | None = None


@dataclass(frozen=True)
class Spans:
    """What a rank recorded since the last time (`Recorder.drain`)."""

    batch: list[Any]


@dataclass(frozen=True)
class Left:
    """A rank that wanrt did not start has finished its part of a run, and waits for the next."""


@dataclass(frozen=True)
class Member:
    """One rank: its name, where it runs (for messages), and what its entry point is given."""

    name: str
    device: str
    assignment: Any


class Distant:
    """A rank that somebody else started, as far as its connection tells; stands in for its process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.lost = False
        self.left = False

    @property
    def exitcode(self) -> int | None:
        """None while it is there; 0 when it has done its part. What a lost one ended with, nobody here knows."""
        return 0 if self.left else None

    def is_alive(self) -> bool:
        """Whether it is in the run."""
        return not (self.lost or self.left)

    def join(self, timeout: float | None = None) -> None:
        """Its end shows on the connection alone."""

    def kill(self) -> None:
        """Gives it up; it ends when its connection does."""
        self.lost = True


@dataclass
class _Seat:
    """A rank and what was heard of it."""

    member: Member
    process: BaseProcess | Distant
    pipe: Connection
    task: Any  # what it is given once all are there; None: it has it
    prepared: bool = False
    ready: bool = False
    failed: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    @property
    def place(self) -> str:
        return f"{self.member.name} ({self.member.device})"

    @property
    def lost(self) -> bool:
        """Whether its connection broke."""
        return isinstance(self.process, Distant) and self.process.lost

    @property
    def struck(self) -> bool:
        """Whether it ended without a word of its own: by a signal, or with its machine."""
        return (self.process.exitcode or 0) < 0 or (self.lost and not self.failed)

    def fate(self) -> str:
        """How it ended, where it did not say so itself."""
        if self.lost:
            return "its connection closed: it was killed, or its machine is gone"
        return _cause_of_death(self.process.exitcode)


class Team:
    """The ranks besides this process.

    `heard` gets every `Spans` and `Loading` message with the rank's name.
    """

    def __init__(self, heard: Callable[[str, Spans | Loading], None] = lambda name, message: None) -> None:
        self._seats: list[_Seat] = []
        self._heard = heard
        self._closed = False

    def start(
        self,
        members: Iterable[Member],
        entry: Callable[[Connection, Any], None],
        reserve: Reserve | None = None,
    ) -> None:
        """Gives each member a process, of `reserve` or a new one; `assign` gives it `entry(pipe, assignment)` to do."""
        wanted, reserve = list(members), reserve or Reserve()
        reserve.fill(len(wanted))
        for member in wanted:
            process, pipe = reserve.take()
            self._seats.append(_Seat(member, process, pipe, Task(entry, member.assignment)))

    def join(self, members: Iterable[tuple[Member, Connection]]) -> None:
        """Takes ranks that are there already; the connections stay their owner's."""
        for member, connection in members:
            self._seats.append(
                _Seat(member, Distant(connection), connection, member.assignment, prepared=True)
            )

    def assign(self, check: Callable[[], None] = lambda: None) -> None:
        """Waits until every process is there, then gives each its assignment: what ranks do together has a time limit,
        which a process that is still importing would use up. `check` is called meanwhile and may raise.

        Raises `RunError` when a process fails or dies first, or is not there after `START_S`.
        """
        deadline = time.monotonic() + START_S

        def check_time() -> None:
            check()
            if time.monotonic() > deadline:
                late = ", ".join(seat.place for seat in self._seats if not seat.prepared)
                raise RunError(
                    f"not started within {START_S:g} s: {late}; look at the load of this machine and at its devices"
                )

        self._wait(lambda seat: seat.prepared, check_time)
        for seat in self._seats:
            task, seat.task = seat.task, None
            if task is not None:
                self._give(seat, task)

    def wait_ready(self, check: Callable[[], None] = lambda: None) -> None:
        """Waits until every rank has done its assignment's preparations; `check` is called meanwhile and may raise.

        Raises `RunError` when a rank fails or dies first.
        """
        self.assign(check)
        self._wait(lambda seat: seat.ready, check)

    def send(self, command: Any, to: frozenset[str] | None = None) -> None:
        """Gives ranks a command, all of them or those of these names. Raises `RunError` when one is gone."""
        for seat in (seat for seat in self._seats if to is None or seat.member.name in to):
            self._give(seat, command)

    def check(self) -> None:
        """Takes in what the ranks said. Raises `RunError` when one has failed or died. Never waits."""
        self._listen(0.0)
        if any(seat.failed or not seat.process.is_alive() for seat in self._seats):
            raise self.failure("a rank ended")

    def failure(self, what: str) -> RunError:
        """The error to raise when the ranks stopped answering: who failed first, where, and its last log lines."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and not self._culprit():
            self._listen(0.05)
        seat = self._culprit()
        if seat is None:
            silent = ", ".join(s.place for s in self._seats if not s.failed) or "no rank"
            return RunError(f"{what}; without an answer: {silent}")
        self._listen(0.0)
        said = seat.failed or seat.fate()
        tail = f"; last lines: {' | '.join(seat.lines)}" if seat.lines else ""
        return RunError(f"{seat.place} failed: {said}{tail}")

    def close(self, patience_s: float | None = None) -> None:
        """Ends every rank: by its pipe, then after `patience_s` by force. Safe to call twice."""
        patience = GOODBYE_S if patience_s is None else patience_s
        for seat in self._seats:
            with contextlib.suppress(OSError):
                seat.pipe.send(None)
            if not seat.prepared:
                seat.process.kill()  # it has nothing to finish, and may be in the middle of an import
        deadline = time.monotonic() + patience
        for seat in self._seats:
            self._drain_until_gone(seat, deadline)
            if seat.process.is_alive():
                log.log(
                    logging.WARNING if patience >= GOODBYE_S else logging.DEBUG,
                    "%s did not end by itself: killed", seat.place,
                )  # fmt: skip
                seat.process.kill()
            seat.process.join()
            if not (isinstance(seat.process, Distant) and seat.process.left):
                seat.pipe.close()
        self._seats = []

    def _wait(self, state: Callable[[_Seat], bool], check: Callable[[], None]) -> None:
        """Until every seat is in a state."""
        while not all(state(seat) for seat in self._seats):
            check()
            self._listen(0.2)
            self.check()

    def _give(self, seat: _Seat, command: Any) -> None:
        try:
            seat.pipe.send(command)
        except OSError as error:
            raise self.failure(f"cannot reach {seat.place}") from error

    def _drain_until_gone(self, seat: _Seat, deadline: float) -> None:
        """A rank may be blocked on a full pipe: keep reading while it ends."""
        while seat.process.is_alive() and time.monotonic() < deadline and not seat.failed:
            self._hear(seat, 0.05)
            seat.process.join(0.01)
        self._hear(seat, 0.0)  # what it said last, or while another one was waited for

    def _culprit(self) -> _Seat | None:
        """Who failed first: a rank that was killed, else one that said why, else one that is gone."""
        killed = (s for s in self._seats if s.struck)
        spoke = (s for s in self._seats if s.failed and "connection" not in s.failed.lower())
        gone = (s for s in self._seats if s.failed or s.lost or s.process.exitcode is not None)
        return next(killed, None) or next(spoke, None) or next(gone, None)

    def _listen(self, seconds: float) -> None:
        """Reads what is there, waiting up to `seconds` for something."""
        open_pipes = [seat.pipe for seat in self._seats if not seat.pipe.closed]
        wait(open_pipes, seconds)
        for seat in self._seats:
            self._hear(seat, 0.0)

    def _hear(self, seat: _Seat, seconds: float) -> None:
        try:
            while seat.pipe.poll(seconds):
                self._take(seat, seat.pipe.recv())
        except (EOFError, OSError):
            if isinstance(seat.process, Distant):
                seat.process.lost = not seat.process.left
            elif seat.process.is_alive():
                seat.process.join(SETTLE_S)

    def _take(self, seat: _Seat, message: Any) -> None:
        if isinstance(message, Line):
            seat.lines.append(message.text)
            log.log(message.level, "%s: %s", seat.member.name, message.text)
        elif isinstance(message, Failed):
            seat.failed = message.text
        elif isinstance(message, Left):
            assert isinstance(seat.process, Distant), "a started rank ends with its process"
            seat.process.left = True
        elif isinstance(message, Prepared):
            seat.prepared = True
            if message.seconds is not None:
                self._heard(seat.member.name, Loading(LIBRARY, message.seconds))
        elif isinstance(message, Ready):
            seat.ready = True
            log.info("%s is ready%s", seat.place, f": {message.detail}" if message.detail else "")
        else:
            self._heard(seat.member.name, message)


@contextlib.contextmanager
def answering(team: Team, what: str) -> Iterator[None]:
    """An exchange with the ranks that breaks off is a rank's failure: raises `RunError` that says whose."""
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise team.failure(f"{what} ({' '.join(str(error).split())[:160]})") from error


def _cause_of_death(code: int | None) -> str:
    if code is None:
        return "does not answer"
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
