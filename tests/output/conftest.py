"""A second decoder (the ffmpeg of imageio-ffmpeg, not PyAV) and moving pictures to send through the sinks."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True)
class Decoded:
    """A file as ffmpeg sees it: frames uint8 [T, H, W, 3], packet times in seconds, its own words about it."""

    frames: np.ndarray
    starts: list[Fraction]
    durations: list[Fraction]
    words: str

    @property
    def end(self) -> Fraction:
        return self.starts[-1] + self.durations[-1]


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def packet_times(path: Path) -> tuple[list[Fraction], list[Fraction]]:
    """Timestamps as the container holds them, through ffmpeg's framecrc; none where it holds no stream yet."""
    text = run("-i", path, "-map", "0:v", "-c", "copy", "-f", "framecrc", "-").stdout.decode()
    time_base = re.search(r"#tb 0: (\S+)", text)
    if not time_base:
        return [], []
    base = Fraction(time_base[1])
    rows = [line.split(",") for line in text.splitlines() if line and line[0] != "#"]
    return [int(row[2]) * base for row in rows], [int(row[3]) * base for row in rows]


@pytest.fixture
def decode():
    """Decode with ffmpeg, frame by frame, nothing dropped or repeated."""

    def decoded(path: Path, width: int = WIDTH, height: int = HEIGHT) -> Decoded:
        scale = "scale=flags=accurate_rnd+full_chroma_int+bilinear"
        output = ("-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
        done = run("-i", path, "-map", "0:v", "-vf", scale, *output)
        frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
        starts, durations = packet_times(path)
        return Decoded(frames, starts, durations, done.stderr.decode(errors="replace"))

    return decoded


@pytest.fixture
def ffmpeg():
    """Run the bundled ffmpeg."""
    return run


@pytest.fixture
def movie():
    """Smooth moving content: RGB waves that drift, uint8 [T, H, W, 3]."""

    def made(frames: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
        t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
        phase = 2 * np.pi * (x / 96 + y / 128 + t / 40)
        waves = [np.sin(phase), np.sin(phase * 0.7 + 1), np.cos(phase * 0.5 + t / 30)]
        return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)

    return made


@pytest.fixture
def psnr():
    """Peak signal to noise over all values, in dB."""

    def value(got: np.ndarray, want: np.ndarray) -> float:
        error = np.mean((got.astype(np.float64) - want.astype(np.float64)) ** 2)
        return float(10 * np.log10(255**2 / max(error, 1e-12)))

    return value


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def free_port():
    """A TCP port of loopback that nobody uses at present."""

    def found() -> int:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            return taken.getsockname()[1]

    return found


@pytest.fixture
def eventually():
    """Wait until a condition holds."""

    def wait(condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.01)

    return wait
