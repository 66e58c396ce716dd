"""The same command twice, in two processes on a GPU: the same frames, bit for bit."""

import hashlib
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def pictures(options, folder):
    """Digests of the PNG frames of one run."""
    command = [sys.executable, "-m", "wanrt", "render", "a red ball bouncing", *options, "-o"]
    subprocess.run([*command, str(folder / "%05d.png")], check=True, timeout=280)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    "options",
    [
        ["--chunks", "4"],
        ["--chunks", "4", "--preset", "self-forcing-1.3b", "--random-weights", "--size", "576x320"],
    ],
    ids=["wan-tiny", "self-forcing"],
)
def test_two_processes_make_the_same_frames(options, tmp_path):
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        runs.append(pictures(options, tmp_path / name))
    assert len(runs[0]) == 9 + 3 * 12
    assert runs[0] == runs[1]
