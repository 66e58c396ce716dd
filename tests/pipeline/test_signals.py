"""Which signals end a run politely, and which are left alone."""

import os
import signal

import pytest

from wanrt.pipeline.cancel import Cancel, CancelledError
from wanrt.pipeline.signals import ending_on_signals


@pytest.fixture
def hangup():
    """Sets what SIGHUP does, and puts it back."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_asks_and_handlers_are_restored(number, hangup):
    hangup(signal.SIG_DFL)
    before, cancel = signal.getsignal(number), Cancel()
    with ending_on_signals(cancel):
        os.kill(os.getpid(), number)
        assert cancel.asked
    assert signal.getsignal(number) is before
    with pytest.raises(CancelledError) as caught:
        cancel.check()
    assert caught.value.exit_code == 128 + number


def test_nohup_is_respected(hangup):
    hangup(signal.SIG_IGN)
    cancel = Cancel()
    with ending_on_signals(cancel):
        os.kill(os.getpid(), signal.SIGHUP)
    assert not cancel.asked


def test_what_leaves_nothing_behind_is_broken_off():
    cancel, after = Cancel(), []

    def work():
        with cancel.raising_at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            after.append("not reached")

    with ending_on_signals(cancel), pytest.raises(CancelledError):
        work()
    assert not after
    assert not cancel.at_once


def test_nothing_begins_once_somebody_asked():
    cancel = Cancel()
    cancel.ask()
    with pytest.raises(CancelledError), cancel.raising_at_once():
        pytest.fail("began")
