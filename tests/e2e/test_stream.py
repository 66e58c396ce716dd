"""`wanrt stream` as a user runs it: to a real RTMP receiver and into a file, steered from other commands."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import imageio_ffmpeg
import pytest

KEY = "s3cr3t-k3y"


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def ask(*args):
    command = [sys.executable, "-m", "wanrt", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)


def test_rtmp_and_a_recording(runtime_directory, port, tmp_path, decode):
    url, log, flv = f"rtmp://127.0.0.1:{port}/live/{KEY}", (tmp_path / "log").open("wb"), tmp_path / "a.flv"
    listener = subprocess.Popen(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-listen", "1", "-i", url, "-c", "copy", flv],
        stdout=log, stderr=log,
    )  # fmt: skip
    command = [sys.executable, "-m", "wanrt", "stream", "a red ball", "--random-weights", "--size", "64x32"]
    command += ["--rtmp", url, "-o", str(tmp_path / "a.mp4"), "--plain", "--stats", str(tmp_path / "s.json")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        status = {}
        deadline = time.monotonic() + 100
        while status.get("frames", 0) < 30 or status["live"]["targets"][0]["sent"] < 30:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
            asked = ask("status")
            status = json.loads(asked.stdout) if asked.returncode == 0 else {}
        assert status["run"] == "stream"
        said = ask("say", "a green star", "--blend", "0s")
        assert said.stdout.startswith("from chunk "), said.stderr
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
        listener.wait(30) if run.returncode == 130 else listener.kill()
    assert run.returncode == 130, err
    recorded, _ = decode(tmp_path / "a.mp4")
    streamed, meta = decode(tmp_path / "a.flv")
    assert len(recorded) >= 33
    assert len(streamed) >= 30
    assert meta["codec"] == "h264"
    stats = (tmp_path / "s.json").read_text()
    assert json.loads(stats)["settings"]["live"]["targets"][0]["sent"] >= 30
    recording = (tmp_path / "a.mp4").read_bytes().decode("latin-1")
    for text in (out, err, stats, recording, json.dumps(status)):
        assert KEY not in text
    assert "rtmp://127.0.0.1" in err


@pytest.mark.parametrize(
    "args",
    [["a ball", "rtmp://127.0.0.1/live/" + KEY], ["rtmp://127.0.0.1/live/" + KEY],
     ["a ball", "--rtmp", "rtmp://127.0.0.1:x/live/" + KEY], ["a ball", "--rtmp", "rtmp://127.0.0.1/" + KEY],
     ["a ball", "-o", "gopher://127.0.0.1/live/" + KEY]],
)  # fmt: skip
def test_mistakes_show_no_key(runtime_directory, args):
    ran = ask("stream", *args, "--random-weights", "--debug")
    assert ran.returncode == 2
    assert KEY not in ran.stdout + ran.stderr
    assert ran.stderr


def test_without_a_run(runtime_directory):
    ran = ask("say", "a ball")
    assert ran.returncode == 2
    assert ran.stderr == "wanrt: no run: nothing is running; wanrt stream starts a run\n"
