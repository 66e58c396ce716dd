"""What stays of a video when its writer is killed, interrupted, or runs out of space."""

import os
import resource
import signal
import subprocess
import sys
from fractions import Fraction

import pytest

from wanrt.errors import OutputError
from wanrt.output import QueuedSink, VideoSpec, open_sink

SPEC = VideoSpec(96, 64, Fraction(16))

# One chunk of 9 frames, then chunks of 12 for ever, each announced once flushed; frame n is of level n % 200
WRITER = """
import signal, sys
from fractions import Fraction
import numpy as np
from wanrt.output import QueuedSink, VideoSpec, open_sink

class Stop(BaseException):
    pass

def stop(number, frame):
    raise Stop

signal.signal(signal.SIGTERM, stop)
sink = open_sink(sys.argv[1], VideoSpec(96, 64, Fraction(16)), codec=sys.argv[2], threads=1, muxer=sys.argv[3])
if sys.argv[4] == "queued":
    sink = QueuedSink(sink)
count = 0
try:
    while True:
        frames = 12 if count else 9
        levels = (np.arange(count, count + frames) % 200).astype(np.uint8)
        sink.write(np.broadcast_to(levels.reshape(-1, 1, 1, 1), (frames, 64, 96, 3)))
        sink.flush_chunk()
        count += frames
        print(count, flush=True)
        sys.stdin.readline()
except Stop:
    sink.finish()
    sys.exit(128 + signal.SIGTERM)
"""


@pytest.fixture
def writer(tmp_path):
    """Start the writer on tmp_path/a.mp4; gives (process, frames flushed after n chunks)."""
    started = []

    def start(chunks, codec="h264", muxer="pyav", how="plain"):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "a.mp4"), codec, muxer, how]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        for _ in range(chunks - 1):
            process.stdout.readline()
            print(file=process.stdin, flush=True)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_after_sigkill_every_flushed_frame_plays(tmp_path, decode, writer, codec):
    process, flushed = writer(3, codec)
    process.kill()
    process.wait()
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(f".a.mp4.{process.pid}-")
    got = decode(part)
    assert flushed == 33
    assert len(got.frames) == 33
    assert got.starts == [Fraction(index, 16) for index in range(33)]
    levels = got.frames.mean(axis=(1, 2, 3))
    assert max(abs(level - index) for index, level in enumerate(levels)) <= 2


def test_after_sigkill_the_second_path_completes_its_file(tmp_path, decode, writer, eventually):
    process, flushed = writer(2, muxer="ffmpeg")
    process.kill()
    process.wait()
    # ffmpeg may have been given its frames and no processor yet
    eventually(lambda: sum(len(decode(file).frames) for file in tmp_path.iterdir()) >= flushed)
    (part,) = tmp_path.iterdir()
    assert len(decode(part).frames) == flushed


@pytest.mark.parametrize("how", ["plain", "queued"])
@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
def test_after_sigterm_the_file_is_finished(tmp_path, decode, writer, muxer, how):
    process, written = writer(2, muxer=muxer, how=how)
    process.terminate()
    assert process.wait(20) == 143
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    got = decode(tmp_path / "a.mp4")
    assert len(got.frames) == written
    assert got.end == Fraction(written, 16)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True
    ).returncode:
        pytest.skip("this system lets even root mount nothing")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(sink, rng, frames=200):
    """Write noise, which fills a disk fast, until the sink fails; returns how many frames were flushed before."""
    flushed = 0
    for _ in range(frames // 4):
        sink.write(rng.integers(0, 256, (4, 64, 96, 3), dtype="uint8"))
        sink.flush_chunk()
        flushed += 4
    return flushed


def fill_and_finish(sink, rng, frames=200):
    fill(sink, rng, frames)
    sink.finish()


@pytest.mark.parametrize("queued", [False, True])
def test_full_disk(small_disk, decode, rng, queued):
    sink = open_sink(small_disk / "a.mp4", SPEC, quality=100, threads=1)
    if queued:
        sink = QueuedSink(sink, capacity=8)
    with pytest.raises(OutputError, match=r"a\.mp4: the disk is full; make space"):
        fill(sink, rng)
    kept = sink.abort()
    assert kept == small_disk / "a.partial.mp4"
    assert len(decode(kept).frames) >= 4
    assert b"rror" not in decode(kept).words.encode(), "the half-written fragment is cut off"
    assert [file.name for file in small_disk.iterdir()] == [kept.name]


def test_disk_too_full_for_the_last_step(small_disk, decode, rng):
    """The remux needs room for a second copy; without it the fragmented file is what stays."""
    sink = open_sink(small_disk / "a.mp4", SPEC, quality=100, threads=1)
    frames = 0
    while sink.temporary.stat().st_size < 36 * 1024:
        frames += fill(sink, rng, 4)
    with pytest.raises(OutputError, match=r"the disk is full.*; what was written plays: .*a\.partial\.mp4"):
        sink.finish()
    assert [file.name for file in small_disk.iterdir()] == ["a.partial.mp4"]
    assert len(decode(small_disk / "a.partial.mp4").frames) == frames


@pytest.mark.parametrize("name", ["a.gif", "a_%d.png"])
def test_full_disk_of_images(small_disk, decode, rng, name):
    sink = open_sink(small_disk / name, SPEC)
    with pytest.raises(OutputError, match="the disk is full"):
        fill_and_finish(sink, rng)
    kept = sink.abort()
    assert len(decode(kept).frames) >= 1
    assert not [file for file in small_disk.iterdir() if ".part." in file.name]


@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
def test_file_size_limit(tmp_path, decode, rng, muxer):
    """`ulimit -f`, which every user can hit; Python ignores SIGXFSZ, its children need not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = (
        open_sink(tmp_path / "a.mp4", SPEC, quality=100, threads=1, muxer="pyav") if muxer == "pyav" else None
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        sink = sink or open_sink(tmp_path / "a.mp4", SPEC, quality=100, threads=1, muxer=muxer)
        with pytest.raises(OutputError, match=r"ulimit -f|ffmpeg ended"):
            fill_and_finish(sink, rng, 400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = sink.abort() or tmp_path / "a.partial.mp4"
    assert len(decode(kept).frames) >= 4


def test_interrupt_while_finishing_keeps_the_temporary(tmp_path, decode, movie, monkeypatch):
    sink = open_sink(tmp_path / "a.mp4", SPEC)
    sink.write(movie(3))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("wanrt.output.publish.remux", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sink.finish()
    (part,) = tmp_path.iterdir()
    assert len(decode(part).frames) == 3


def test_dead_pipe_is_one_line(tmp_path, movie, rng):
    sink = open_sink(tmp_path / "a.mp4", SPEC, muxer="ffmpeg")
    sink.write(movie(20))
    os.kill(sink._process.pid, signal.SIGKILL)
    with pytest.raises(OutputError, match="ffmpeg ended with code -9: no message"):
        fill(sink, rng, 4000)
    sink.abort()
