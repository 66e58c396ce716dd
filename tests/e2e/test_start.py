"""What a user sees first, and what is refused, before anything heavy is imported."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture
def no_torch(tmp_path):
    """Starts the command in a world where importing torch takes forever."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("import time\ntime.sleep(60)\n")
    paths = [str(tmp_path / "path"), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = []

    def start(*args, stderr=subprocess.PIPE):
        command = [sys.executable, "-m", "wanrt", "render", "a ball", *map(str, args)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TERM": "xterm"}
        started.append(subprocess.Popen(command, stderr=stderr, stdout=subprocess.PIPE, text=True, env=env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_line_is_there_before_torch(no_torch, tmp_path):
    process = no_torch("-o", tmp_path / "x.mp4", "--random-weights")
    assert "loading PyTorch" in process.stderr.readline()
    assert process.poll() is None


def test_the_panel_is_there_before_torch(no_torch, tmp_path):
    terminal, end = os.openpty()
    process = no_torch("-o", tmp_path / "x.mp4", "--random-weights", stderr=end)
    os.close(end)
    seen = ""
    while "PyTorch" not in seen:
        seen += os.read(terminal, 4096).decode()
    assert process.poll() is None
    os.close(terminal)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_breaks_the_start_off(no_torch, tmp_path, signum, code):
    process = no_torch("-o", tmp_path / "x.mp4", "--random-weights")
    process.stderr.readline()
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err == f"wanrt: ended by {signum.name}\n"
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stats", "."], "is a directory"),
        (["--stats", "/proc/s.json"], "cannot be written"),
        (["--stats", "{out}"], "twice"),
        (["--stats", "same.json", "--trace", "same.json"], "twice"),
        (["-o", "/proc/x.mp4"], "cannot write there"),
    ],
)
def test_refusals_wait_for_nothing(no_torch, tmp_path, flags, words):
    out = str(tmp_path / "x.mp4")
    process = no_torch("-o", out, "--random-weights", "-q", *(flag.format(out=out) for flag in flags))
    _, err = process.communicate(timeout=30)
    assert process.returncode in (1, 2)
    assert words in err
    assert len(err.splitlines()) == 1
