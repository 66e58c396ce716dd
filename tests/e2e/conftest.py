"""The command as a user runs it, and a decoder that is not ours."""

import json
import os
import subprocess
import sys

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
