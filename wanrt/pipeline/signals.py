"""SIGINT, SIGTERM and SIGHUP become a polite end; a second one is not polite."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from wanrt.pipeline.cancel import Cancel

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal or the connection is gone

log = logging.getLogger("wanrt.pipeline")


@contextmanager
def ending_on_signals(cancel: Cancel, *, launched: bool = False) -> Iterator[None]:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP asks `cancel`; a second kills the process at once.

    launched: by torchrun, which sends SIGTERM to every rank when one has ended, and again while they end: more signals
    then change nothing, and the handlers stay. Else handlers are restored at the end.

    SIGHUP stays ignored under nohup. Outside the main thread Python sets no handlers: then this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        log.debug("signals are not handled: the run is not on the main thread")
        yield
        return

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if cancel.asked and launched:
            return
        if cancel.asked:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        cancel.ask(signum)
        if cancel.at_once:
            cancel.check()

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, on_signal) for number in POLITE if number not in ignored}
    try:
        yield
    finally:
        for number, handler in [] if launched else before.items():
            signal.signal(number, handler)
