"""Ranks that torchrun started: the same frames as wanrt's own, refusals on every rank, a rank that dies."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

# Runs wanrt as one rank and notes what it ended with; outlives torchrun's signals, which wanrt must answer itself.
RANK = """
import os, signal, subprocess, sys
folder, *arguments = sys.argv[1:]
ran = subprocess.Popen([sys.executable, "-m", "wanrt", *arguments])
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda number, frame: ran.send_signal(number))
note = os.path.join(folder, os.environ["RANK"])
with open(note + ".pid.new", "w") as file:
    file.write(str(ran.pid))
os.rename(note + ".pid.new", note + ".pid")
code = ran.wait()
with open(note + ".code", "w") as file:
    file.write(str(code))
sys.exit(code if code >= 0 else 128 - code)
"""
SMALL = ["--random-weights", "--size", "64x48"]


@pytest.fixture
def torchrun(tmp_path):
    """Starts `wanrt` on some ranks; what still runs at the end is the test's failure."""
    notes = tmp_path / "ranks"
    notes.mkdir()
    (notes / "rank.py").write_text(RANK)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []

    def start(ranks, *arguments):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            str(notes / "rank.py"), str(notes), *map(str, arguments), *SMALL,
        ]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
        return started[-1]

    start.codes = lambda: {int(p.stem): int(p.read_text()) for p in notes.glob("*.code")}
    start.pid = lambda rank: int((notes / f"{rank}.pid").read_text())
    yield start
    left = [
        p.pid for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())
    ]
    for process in started:
        process.kill()
        process.communicate()
    assert not left


def images(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_frames_as_ranks_of_its_own(torchrun, wanrt, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ball = ("render", "a ball", "--chunks", "3", "--topology", "tp=2")
    process = torchrun(2, *ball, "-o", tmp_path / "a" / "%03d.png", "--stats", tmp_path / "s.json", "--plain")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == f"{tmp_path}/a/%03d.png\n"
    assert err.count("scene 1: a ball") == 1  # one rank talks
    stages = json.loads((tmp_path / "s.json").read_text())["stats"]["stages"]
    assert {stage["rank"] for stage in stages if stage["stage"] == "mesh"} == {"main", "mesh1"}
    own = wanrt(*ball, "-o", tmp_path / "b" / "%03d.png", "-q")
    assert own.returncode == 0, own.stderr
    assert len(images(tmp_path / "a")) == 33
    assert images(tmp_path / "a") == images(tmp_path / "b")


def test_a_wrong_number_of_ranks_is_refused_on_every_rank(torchrun, tmp_path):
    process = torchrun(2, "render", "a ball", "--topology", "pp1+tp=2", "-o", tmp_path / "x.mp4", "-q")
    _, err = process.communicate(timeout=120)
    assert torchrun.codes() == {0: 2, 1: 2}
    words = "wanrt: topology pp1+tp=2: 1 + 2 = 3 devices, but WORLD_SIZE = 2; start 3, or take ulysses=2"
    assert err.count(words) == 1
    assert not (tmp_path / "x.mp4").exists()


def test_a_rank_that_dies_is_named_and_the_file_is_finished(torchrun, decode, tmp_path):
    out = tmp_path / "x.mp4"
    process = torchrun(
        3, "render", "a ball", "--chunks", "900", "--topology", "pp1+ulysses=2", "-o", out, "--json-progress"
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("{") and json.loads(line).get("frames_done", 0) >= 21:
            os.kill(torchrun.pid(2), signal.SIGKILL)
            break
    said += process.communicate(timeout=120)[1].splitlines()
    assert torchrun.codes()[0] == 1
    assert torchrun.codes()[1] == 1
    (error,) = [line for line in said if line.startswith("wanrt: ")]
    assert "mesh1 (cpu) failed: its connection closed" in error
    assert "last lines: cpu, 1 threads" in error
    frames, _ = decode(out)
    assert len(frames) >= 21
    assert (len(frames) - 9) % 12 == 0
