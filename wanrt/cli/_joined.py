"""Commands under torchrun: rank 0 is the command, every other rank serves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from wanrt.parallel.crew import Crew
    from wanrt.parallel.launch import Launch


@contextmanager
def crew() -> Iterator[Crew | None]:
    """The ranks that torchrun started beside this one; None without torchrun.

    On any rank but 0 the block is never entered: the process serves rank 0 and ends with its exit code. However the
    block ends on rank 0, the others are told.
    """
    import os

    from wanrt.parallel.launch import Launch

    launch = Launch.find(os.environ)
    if launch is None:
        yield None
        return
    if launch.rank > 0:
        _serve(launch)
    from wanrt.parallel.crew import Crew

    found = Crew(launch)
    try:
        yield found
    except BaseException as error:
        _leave_unhurried()
        found.dismiss(_code(error), str(error))
        raise
    found.dismiss(0)


def _leave_unhurried() -> None:
    """Lets this process end with its own exit code: torchrun sends SIGTERM as soon as one rank has left with one."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _serve(launch: Launch) -> NoReturn:
    from wanrt.parallel.crew import follow
    from wanrt.pipeline.devices import wait_passively

    wait_passively()
    from wanrt.pipeline.ranks import follow_runs

    follow(launch, follow_runs)


def _code(error: BaseException) -> int:
    from wanrt.cli.app import FAILED, INTERRUPTED

    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", FAILED)
