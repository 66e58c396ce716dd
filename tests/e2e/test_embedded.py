"""The embedded model through the command line: what the prompt says is in the picture, on one rank and on two."""

import os
import subprocess
import sys

import numpy as np
import pytest

from wanrt.script import load_preset
from wanrt.weights.registry import find_parts

HERE = find_parts(load_preset("wan-tiny"), ())
pytestmark = pytest.mark.skipif("transformer" not in HERE, reason="the embedded weights are not in this tree")


@pytest.fixture
def render(tmp_path, decode):
    """Frames of a prompt rendered by the embedded model with its own settings."""

    def render(prompt, *flags):
        out = tmp_path / "x.mkv"
        command = [
            sys.executable,
            "-m",
            "wanrt",
            "render",
            prompt,
            "-o",
            str(out),
            "--quality",
            "crf=6",
            "-q",
            "-f",
        ]
        env = {**os.environ, "WANRT_WEIGHTS": str(tmp_path / "none")}
        done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return decode(out)[0].astype(int)

    return render


def test_a_red_ball_on_blue(render):
    frames = render("a red ball bouncing over a blue night sky", "--chunks", "2", "--seed", "7")
    assert frames.shape == (21, 128, 224, 3)
    red = ((frames[..., 0] - frames[..., 1] > 60) & (frames[..., 0] - frames[..., 2] > 60)).mean(axis=(1, 2))
    blue = (frames[..., 2] > frames[..., 0] + 20).mean(axis=(1, 2))
    assert (red > 0.01).all()
    assert (red < 0.25).all()
    assert (blue > 0.4).all()
    rows = [np.argwhere(frame[..., 0] - frame[..., 2] > 60)[:, 0].mean() for frame in frames]
    assert max(rows) - min(rows) > 5  # it moves up and down


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["tp=2", "tp=4", "ulysses=2", "pp1+tp=2"])
def test_ranks_read_their_slices_and_make_the_same(render, topology):
    flags = ("a green star spinning", "--chunks", "2", "--seed", "3")
    alone, together = render(*flags), render(*flags, "--topology", topology)
    assert np.abs(alone - together).mean() < 0.5
    assert np.abs(alone - together).max() < 24
