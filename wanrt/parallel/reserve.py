"""Rank processes that are started before anybody knows what they will do: a new process needs seconds for its imports.

Each prepares itself, says so, and waits at its pipe for a task: a function of an importable module, and what it is
given beside the pipe. `Team` hands the tasks out.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from wanrt.parallel.member import Failed, die_with_parent, leave, logging_into, words_of

Prepare = Callable[[int], None]  # gets the rank's number


@dataclass(frozen=True)
class Prepared:
    """A process is there, and waits for its task. `seconds` its preparation took; None: it has none."""

    seconds: float | None


@dataclass(frozen=True)
class Task:
    """What a process is to do: `entry(pipe, assignment)`."""

    entry: Callable[[Connection, Any], None]
    assignment: Any


class Reserve:
    """Processes without a task. `prepare(number)`, of an importable module, is what each does first; its number is its
    place among those that wait, from 1: that of the rank it will be, this process being rank 0.
    """

    def __init__(self, prepare: Prepare | None = None) -> None:
        self._prepare = prepare
        self._waiting: deque[tuple[BaseProcess, Connection]] = deque()

    def fill(self, count: int) -> None:
        """Starts what is missing to so many processes; none is waited for."""
        for number in range(len(self._waiting) + 1, count + 1):
            self._waiting.append(_start(self._prepare, number))

    def take(self) -> tuple[BaseProcess, Connection]:
        """The process that has waited longest; it is now its taker's to end."""
        return self._waiting.popleft()

    def wait(self) -> None:
        """Until every one that waits is prepared, or has failed, which its taker will hear."""
        for _, pipe in self._waiting:
            pipe.poll(None)

    def close(self) -> None:
        """Ends the processes that nobody took."""
        for process, _ in self._waiting:
            process.kill()  # it has nothing to finish, and may be in the middle of an import
        for process, pipe in self._waiting:
            process.join()
            pipe.close()
        self._waiting.clear()

    def __enter__(self) -> Reserve:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _start(prepare: Prepare | None, number: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(
        target=_live, args=(theirs, prepare, number), name=f"wanrt rank {number}", daemon=True
    )
    process.start()
    theirs.close()
    return process, mine


def _live(pipe: Connection, prepare: Prepare | None, number: int) -> None:
    """A rank's process: dies with its parent, leaves Ctrl-C to it, says why when it fails."""
    import signal

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with logging_into(pipe):
        try:
            _do_task(pipe, prepare, number)
        except (EOFError, BrokenPipeError):  # the parent is gone
            pass
        except BaseException as error:
            with contextlib.suppress(OSError):
                pipe.send(Failed(words_of(error)))
            leave(1)
    leave(0)


def _do_task(pipe: Connection, prepare: Prepare | None, number: int) -> None:
    seconds = None
    if prepare is not None:
        began = time.perf_counter()
        prepare(number)
        seconds = time.perf_counter() - began
    pipe.send(Prepared(seconds))
    task = pipe.recv()
    if isinstance(task, Task):  # else the team has ended before
        task.entry(pipe, task.assignment)
