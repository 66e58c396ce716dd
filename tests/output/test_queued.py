"""The queue between the pipeline and an encoder: order, bounds, failures, no deadlocks."""

import ctypes
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from wanrt.errors import OutputError
from wanrt.output import PixelFormat, QueuedSink, Sink, VideoSpec, open_sink

SPEC = VideoSpec(4, 2, Fraction(16))


def block(frames, value=0):
    return np.full((frames, 2, 4, 3), value, np.uint8)


class Recording(Sink):
    """Remembers what it is told, in order; waits for `gate`; fails at frame `fail_at`."""

    spec, pixel_format = SPEC, PixelFormat.RGB

    def __init__(self, fail_at=None, error=None):
        self.calls, self.threads = [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.fail_at, self.error = fail_at, error or OutputError("disk: full")

    def write(self, pixels):
        self.gate.wait(10)
        self.threads.add(threading.current_thread().name)
        self.calls.append(("write", int(pixels[0, 0, 0, 0])))
        self.frames_written += len(pixels)
        if self.fail_at is not None and self.frames_written >= self.fail_at:
            raise self.error

    def flush_chunk(self):
        self.calls.append(("flush",))

    def finish(self):
        self.calls.append(("finish",))
        return Path("out.mp4")

    def abort(self):
        self.calls.append(("abort",))
        return Path("out.partial.mp4")


def write_often(sink):
    for _ in range(1000):
        sink.write(block(1))


def eventually(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_order_is_kept_on_one_other_thread():
    inner = Recording()
    sink = QueuedSink(inner, capacity=3)
    for value in range(20):
        sink.write(block(2, value))
        sink.flush_chunk()
    assert sink.finish() == Path("out.mp4")
    assert inner.calls == [c for value in range(20) for c in (("write", value), ("flush",))] + [("finish",)]
    assert inner.threads == {"wanrt-output"}
    assert sink.state.frames_in == sink.state.frames_out == 40


def test_write_blocks_at_capacity_and_says_so():
    inner = Recording()
    inner.gate.clear()
    sink = QueuedSink(inner, capacity=4)
    sink.write(block(2))
    sink.write(block(2))
    done = threading.Event()
    producer = threading.Thread(target=lambda: (sink.write(block(1)), done.set()))
    producer.start()
    assert not done.wait(0.1)
    state = sink.state
    assert (state.depth, state.capacity, state.frames_in, state.frames_out) == (4, 4, 4, 0)
    assert state.lag >= 0.1
    inner.gate.set()
    assert done.wait(60)
    producer.join()
    sink.finish()
    assert sink.state.blocked >= 0.1
    assert (sink.state.depth, sink.state.lag) == (0, 0.0)


def test_a_block_larger_than_the_queue_passes():
    inner = Recording()
    sink = QueuedSink(inner, capacity=2)
    for _ in range(3):
        sink.write(block(5))
    sink.finish()
    assert inner.frames_written == 15


@pytest.mark.parametrize(
    "error", [OutputError("disk: full"), ValueError("bad frame"), RuntimeError("encoder")]
)
def test_failures_reach_the_producer_soon_and_always(error):
    inner = Recording(fail_at=3, error=error)
    sink = QueuedSink(inner, capacity=4)
    with pytest.raises(OutputError, match=rf"{error}; what was written plays: out\.partial\.mp4") as caught:
        write_often(sink)
    assert "\n" not in str(caught.value)
    assert sink.state.frames_in < 12, "within a queue's length"
    for call in (lambda: sink.write(block(1)), sink.flush_chunk, sink.finish):
        with pytest.raises(OutputError, match=str(error)):
            call()
    assert sink.abort() == Path("out.partial.mp4")
    assert inner.calls.count(("abort",)) == 1


def test_a_blocked_producer_wakes_when_the_sink_fails():
    inner = Recording(fail_at=1)
    inner.gate.clear()
    sink = QueuedSink(inner, capacity=1)
    sink.write(block(1))
    caught = []

    def produce():
        try:
            sink.write(block(1))
        except OutputError as error:
            caught.append(error)

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.05)
    inner.gate.set()
    producer.join(60)
    assert caught


def test_a_stuck_sink_is_given_up():
    inner = Recording()
    inner.gate.clear()
    sink = QueuedSink(inner, capacity=1, stall_seconds=0.1)
    sink.write(block(1))
    with pytest.raises(OutputError, match=r"no frame taken for 0\.1 s"):
        sink.write(block(1))
    with pytest.raises(OutputError, match=r"no frame taken for 0\.1 s"):
        sink.finish()
    inner.gate.set()


def test_a_failing_finish_is_reported_once_as_it_is():
    class Failing(Recording):
        def finish(self):
            raise OutputError("out.mp4: no room; what was written plays: out.partial.mp4")

    sink = QueuedSink(Failing())
    sink.write(block(1))
    with pytest.raises(OutputError) as caught:
        sink.finish()
    assert str(caught.value) == "out.mp4: no room; what was written plays: out.partial.mp4"


def test_abort_drops_what_waits():
    inner = Recording()
    inner.gate.clear()
    sink = QueuedSink(inner)
    for value in range(5):
        sink.write(block(1, value))
    eventually(lambda: sink.state.lag > 0)
    threading.Timer(0.05, inner.gate.set).start()
    assert sink.abort() == Path("out.partial.mp4")
    assert inner.calls in ([("write", 0), ("abort",)], [("abort",)])
    with pytest.raises(OutputError, match="after it was closed"):
        sink.write(block(1))


def test_finish_twice_gives_the_same_path():
    sink = QueuedSink(Recording())
    sink.write(block(1))
    assert sink.finish() == sink.finish() == Path("out.mp4")


def test_real_file_through_the_queue(tmp_path, decode, movie, psnr):
    frames = movie(33)
    sink = QueuedSink(
        open_sink(tmp_path / "a.mp4", VideoSpec(96, 64, Fraction(16)), quality=100), capacity=24
    )
    for at in range(0, 33, 12):
        sink.write(frames[at : at + 12])
        sink.flush_chunk()
    assert psnr(decode(sink.finish()).frames, frames) >= 40


def naps_beside(sink, frames):
    """How many naps of a millisecond this thread gets while another encodes `frames`."""
    naps = 0
    sink.write(frames)
    while sink.state.frames_out < len(frames):
        time.sleep(0.001)
        naps += 1
    sink.abort()
    return naps


def test_encoding_lets_python_run(tmp_path, rng):
    """PyAV gives up the interpreter lock while it encodes: a frame takes some 20 ms here. If it held it, this thread
    would get on between two frames alone. A machine that others share may stand still for a try.
    """
    frames = rng.integers(0, 256, (24, 352, 640, 3), dtype=np.uint8)
    spec = VideoSpec(640, 352, Fraction(16))
    tries = (
        QueuedSink(open_sink(tmp_path / f"{i}.mp4", spec, quality=100, threads=1), capacity=96)
        for i in range(8)
    )
    assert any(naps_beside(sink, frames) > 4 * len(frames) for sink in tries)


def test_a_held_interpreter_lock_would_be_seen():
    """The test above could fail: here the lock is held."""

    class Holding(Recording):
        def write(self, pixels):
            for _ in range(len(pixels)):
                ctypes.PyDLL(None).usleep(20_000)
            super().write(pixels)

    assert naps_beside(QueuedSink(Holding(), capacity=96), np.zeros((24, 2, 2, 3), np.uint8)) <= 2 * 24
