"""Live streams to a real RTMP server: nginx with libnginx-mod-rtmp, started here on loopback."""

import logging
import re
import threading
import time
from fractions import Fraction

import pytest

from wanrt.errors import OutputError
from wanrt.output import QueuedSink, VideoSpec, open_sink
from wanrt.output.delivery import DeliveryPhase
from wanrt.output.live import LiveSink
from wanrt.output.tee import TeeSink

SPEC = VideoSpec(96, 64, 48)


@pytest.fixture
def generator(movie):
    """Writes chunks of 12 frames as fast as the sink takes them, in a thread, until stopped."""
    stop, threads, counts = threading.Event(), [], []

    def start(sink):
        frames = movie(48)

        def generate():
            while not stop.is_set():
                at = 12 * (len(counts) % 4)
                sink.write(frames[at : at + 12])
                sink.flush_chunk()
                counts.append(12)

        threads.append(threading.Thread(target=generate))
        threads[-1].start()

    def finish():
        stop.set()
        for thread in threads:
            thread.join(60)
        return sum(counts)

    start.finish = finish
    yield start
    finish()


def is_live(sink):
    return sink.state.targets[0].phase is DeliveryPhase.LIVE


def test_hls_of_nginx_plays(nginx, decode, movie, eventually):
    nginx.start()
    nginx.wait()
    sink = LiveSink([nginx.url()], SPEC, threads=1)
    eventually(lambda: is_live(sink))
    frames = movie(108)
    for at in range(0, 108, 12):
        sink.write(frames[at : at + 12])
    sink.finish()
    eventually(nginx.playlist.exists)
    got = decode(nginx.whole())
    assert 96 <= len(got.frames) <= 108, "whole segments of one GOP"
    steps = {b - a for a, b in zip(got.starts, got.starts[1:], strict=False)}
    assert all(abs(step - Fraction(1, 48)) <= Fraction(1, 1000) for step in steps)
    assert "Audio: aac (LC)" in got.words


@pytest.mark.parametrize("app", ["closed", "nothing"])
def test_refused(nginx, movie, eventually, caplog, app):
    nginx.start()
    nginx.wait()
    with caplog.at_level(logging.DEBUG):
        sink = LiveSink([nginx.url(app)], SPEC, threads=1)
        eventually(lambda: sink.state.targets[0].error)
        target = sink.state.targets[0]
        sink.abort()
    assert re.match(r"rtmp://127\.0\.0\.1: .*check (host, )?application and stream key", target.error)
    assert "s3cret" not in caplog.text + repr(target)
    if target.phase is DeliveryPhase.FAILED:
        with pytest.raises(OutputError, match="refused"):
            sink._raise_failure()


def test_absent_restarted_and_the_recording_is_whole(nginx, tmp_path, generator, decode, eventually, caplog):
    """How soon it recovers is for the soak, on a quiet machine; here it has to, and nothing may be lost."""
    live = LiveSink([nginx.url()], SPEC, latency=1, threads=1)
    tee = TeeSink([QueuedSink(open_sink(tmp_path / "a.mp4", SPEC, threads=1)), live])
    with caplog.at_level(logging.DEBUG):
        generator(tee)
        eventually(lambda: live.state.targets[0].error)
        nginx.start()
        eventually(lambda: is_live(live))
        for _ in range(2):
            eventually(lambda: live.state.targets[0].sent > 12)
            nginx.stop()
            eventually(lambda: not is_live(live))
            nginx.start()
            eventually(lambda: is_live(live))
        sent = live.state.targets[0].sent
        eventually(lambda: live.state.targets[0].sent > sent + 12)
        written = generator.finish()
        tee.finish()
    target = live.state.targets[0]
    assert target.sent + target.dropped == live.state.ticks, "every frame shown is accounted for"
    recording = decode(tmp_path / "a.mp4")
    assert len(recording.frames) == written
    assert recording.starts == [Fraction(number, 48) for number in range(written)]
    assert "s3cret" not in caplog.text
    assert target.connections >= 3
    assert "127.0.0.1: live again (connection 3)" in caplog.text


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_soak(nginx, tmp_path, generator, decode, eventually):
    """Ten minutes, five restarts of the server with up to ten seconds of absence each."""
    live = LiveSink([nginx.url()], SPEC, latency=1, threads=1)
    tee = TeeSink([QueuedSink(open_sink(tmp_path / "a.mp4", SPEC, threads=1)), live])
    nginx.start()
    generator(tee)
    recoveries = []
    for absence in (0, 1, 3, 6, 10):
        time.sleep(100)
        nginx.stop()
        time.sleep(absence)
        nginx.start()
        returned = time.monotonic()
        eventually(lambda: live.state.targets[0].connections == len(recoveries) + 2, 20)
        recoveries.append(time.monotonic() - returned)
    time.sleep(60)
    written = generator.finish()
    tee.finish()
    state = live.state
    print(recoveries, state)
    assert max(recoveries) < 5
    assert state.targets[0].connections == 6
    assert state.targets[0].sent + state.targets[0].dropped == state.ticks
    assert len(decode(tmp_path / "a.mp4").frames) == written
