"""The command as a user runs it, and a decoder that is not ours."""

import json
import os
import subprocess
import sys
import tempfile
import time

import imageio_ffmpeg
import numpy as np
import pytest


@pytest.fixture
def wanrt(tmp_path):
    """`wanrt(*args)` runs the command to its end; `wanrt.start(*args)` only starts it. Small and random by default."""
    env = {**os.environ, "COLUMNS": "100", "WANRT_WEIGHTS": str(tmp_path / "weights")}
    small = ["--random-weights", "--size", "64x48"]

    def command(args):
        return [sys.executable, "-m", "wanrt", *map(str, args)]

    def run(*args, **kwargs):
        return subprocess.run(
            command([*args, *small]), env=env, capture_output=True, text=True, timeout=120, **kwargs
        )

    def start(*args):
        return subprocess.Popen(
            command([*args, *small]), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    run.start = start
    return run


@pytest.fixture
def decode():
    """All frames of a file as `[T, H, W, 3]`, and what ffmpeg says about it."""

    def decode(path):
        reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
        meta = next(reader)
        width, height = meta["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
        return np.stack(frames), meta

    return decode


@pytest.fixture
def events():
    """The objects of a --json-progress run's stderr; every line must be one."""
    return lambda text: [json.loads(line) for line in text.splitlines()]


class Streaming:
    """`wanrt stream` as a process of its own, asked over its control socket."""

    def __init__(self, place, args):
        command = [sys.executable, "-m", "wanrt", "stream", *map(str, args)]
        self.error = (place / "stderr").open("wb")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.error, stdin=subprocess.DEVNULL, text=True, cwd=place
        )
        self.place = place

    @property
    def talk(self):
        """What it has said on stderr so far."""
        return (self.place / "stderr").read_text()

    def status(self):
        """What `wanrt status` shows; {} while it is not there yet."""
        return ask("status") or {}

    def target(self):
        """The first live target's numbers; phase "" before there are any."""
        live = self.status().get("live")
        return live["targets"][0] if live else {"phase": "", "sent": 0, "connections": 0, "error": ""}

    def until(self, condition, seconds=100):
        """Waits for something to happen while it runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.talk[-2000:]
            assert time.monotonic() < deadline, self.talk[-2000:]
            time.sleep(0.05)

    def end(self):
        """Stops it; what it printed."""
        ask("stop")
        out, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == 0, self.talk[-2000:]
        return out


def ask(command, **fields):
    """An answer of the only run, without a process for each question; None when nobody answers."""
    from wanrt.errors import WanrtError
    from wanrt.pipeline import control

    try:
        return control.ask(control.find_run(None), command, **fields)
    except WanrtError:
        return None


@pytest.fixture
def runtime_directory(monkeypatch):
    """Where runs of this test alone keep their sockets; a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield folder


@pytest.fixture
def streaming(runtime_directory, tmp_path):
    """Starts `wanrt stream` with a runtime directory of the test's own."""
    started = []

    def start(*args):
        started.append(Streaming(tmp_path, args))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        run.process.wait()
        run.error.close()
