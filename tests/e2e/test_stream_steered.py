"""`wanrt stream` steered by the other commands and by its saved file, each a process of its own."""

import json
import re
import stat
import subprocess
import sys

import pytest

SMALL = ("--random-weights", "--size", "64x32", "--plain")


def wanrt(*args):
    return subprocess.run(
        [sys.executable, "-m", "wanrt", *map(str, args)], capture_output=True, text=True, timeout=100
    )


def status():
    return json.loads(wanrt("status").stdout)


def test_every_command_and_the_saved_file(streaming, tmp_path, monkeypatch):
    from wanrt.pipeline.control import runtime_directory

    file = tmp_path / "p.toml"
    file.write_text('[[scene]]\nprompt = "a ball"\n')
    run = streaming(file, *SMALL, "-o", tmp_path / "a.mp4", "--watch")
    run.until(lambda: run.status().get("frames", 0) > 20)
    socket = runtime_directory() / "p.sock"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700

    for command in (["say", "a moon", "--blend", "0s", "--run", "p"], ["seed", 7], ["set", "bias=0.3"]):
        done = wanrt(*command)
        assert re.fullmatch(r"from chunk \d+\n", done.stdout), done.stderr
    run.until(lambda: run.status()["prompt"] == "a moon")
    assert (status()["seed"], status()["run"]) == (7, "p")
    wrong = wanrt("set", "bias=7")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("wanrt: bias: got ")

    assert wanrt("pause").returncode == 0
    run.until(lambda: run.status()["phase"] == "paused")
    here = status()["frames"]
    assert wanrt("resume").returncode == 0
    run.until(lambda: run.status()["frames"] > here)

    file.write_text("[[scene]]\nprompt = \n")
    run.until(lambda: "this edit is not used" in run.talk)
    assert status()["prompt"] == "a moon"
    file.write_text('codec = "hevc"\nduration = "50s"\n[[scene]]\nprompt = "a star"\n')
    run.until(lambda: run.status()["prompt"] == "a star")
    assert "p.toml: duration, codec: as before; a running stream cannot change that" in run.talk
    assert wanrt("stop").returncode == 0
    assert run.process.wait(60) == 0
    assert not socket.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-o", "none/a.mp4"], "none: no such directory; create it with mkdir -p"),
        ([], "nowhere to stream to: give --rtmp URL, --output TARGET or --serve"),
    ],
)
def test_wrong_use_is_told_at_once(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    done = wanrt("stream", "a ball", *SMALL, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"wanrt: {words}\n"
