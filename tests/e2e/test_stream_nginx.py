"""`wanrt stream` as a process, to a real RTMP server that goes and comes back, and into a recording."""

import json
import re
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise

import imageio_ffmpeg
import numpy as np
import pytest

from tests.servers import KEY

FPS = 8  # of demo-live


def packets(path):
    """Times of a file's video packets in seconds, as its container has them."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *f"-i {path} -map 0:v -c copy -f framecrc -".split()]
    text = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    base = float(Fraction(re.search(r"#tb 0: (\d+/\d+)", text)[1]))
    return [int(line.split(",")[2]) * base for line in text.splitlines() if line and line[0] != "#"]


def start(streaming, nginx, tmp_path):
    """The live demo to the server and into a recording, with statistics."""
    return streaming(
        "demo-live", "--rtmp", nginx.url(), "--output", tmp_path / "rec.mp4", "--stats", tmp_path / "s.json",
        "--plain", "--debug",
    )  # fmt: skip


def is_live(run, connections):
    target = run.target()
    return target["phase"] == "live" and target["connections"] == connections


def restart(run, nginx, absence, connections):
    """Server gone for `absence` seconds; seconds from its return to the stream's."""
    nginx.stop()
    time.sleep(absence)
    nginx.start()
    nginx.wait()
    returned = time.monotonic()
    run.until(lambda: is_live(run, connections))
    return time.monotonic() - returned


def check_recording(path, stats):
    """Every frame made is in the recording, at its exact time."""
    times = packets(path)
    assert len(times) == json.loads(stats.read_text())["stats"]["frames"]
    assert [round(time * FPS, 3) for time in times] == list(range(len(times)))
    return len(times)


def test_absent_steered_restarted(streaming, nginx, tmp_path, decode):
    """A server that comes late and is restarted: its HLS plays and shows the prompt said, the recording is whole."""
    run = start(streaming, nginx, tmp_path)
    run.until(lambda: run.target()["error"])
    assert run.status()["frames"] >= 0, "it goes on without its server"
    nginx.start()
    nginx.wait()
    run.until(lambda: is_live(run, 1))
    run.until(lambda: run.target()["sent"] > FPS)
    restart(run, nginx, 0, 2)
    said = subprocess.run(
        [sys.executable, "-m", "wanrt", "say", "a yellow star spinning over a night sky", "--blend", "0s"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    chunk = int(re.fullmatch(r"from chunk (\d+)\n", said.stdout)[1])
    run.until(lambda: run.status()["prompt_to_pixel_s"] is not None)
    sent = run.target()["sent"]
    run.until(lambda: run.target()["sent"] > sent + 6 * FPS)  # three GOPs, so that two are segments
    status = run.status()
    printed = run.end()

    measured = json.loads((tmp_path / "s.json").read_text())
    (latency,) = measured["settings"]["prompt_to_pixel_s"]
    assert latency == status["prompt_to_pixel_s"]
    period, queue = measured["stats"]["period"]["max_ms"] / 1000, measured["settings"]["latency_s"]
    assert latency <= 2 * period + queue, "prompt to pixel: at most two chunk periods and the queue"
    assert check_recording(tmp_path / "rec.mp4", tmp_path / "s.json") > 0
    recorded, _ = decode(tmp_path / "rec.mp4")
    first = 12 * chunk - 3
    assert np.abs(recorded[first - 6].astype(int) - recorded[first + 8]).mean() > 20, "another world"
    streamed, meta = decode(nginx.whole())
    assert (meta["codec"], meta["size"], meta["fps"]) == ("h264", (160, 96), FPS)
    assert np.abs(recorded[first + 8].astype(int) - streamed[-1]).mean() < 40
    steps = {round(b - a, 3) for a, b in pairwise(packets(nginx.whole()))}
    assert steps == {1 / FPS}, "a constant rate, timestamps in order"
    counted = measured["settings"]["live"]["targets"][0]
    assert counted["connections"] == 2
    assert counted["dropped"] > 0
    everything = [run.talk, printed, json.dumps(status), (tmp_path / "s.json").read_text()]
    assert not [text for text in everything if KEY in text]


@pytest.mark.parametrize("app", ["closed", "nothing"])
def test_a_refusal_is_told(streaming, nginx, tmp_path, app):
    """A wrong application or key: this server only hangs up, which may also be a passing fault, so it is tried on."""
    nginx.start()
    nginx.wait()
    run = streaming("demo-live", "--rtmp", nginx.url(app), "--plain", "--debug")
    words = re.compile(r"rtmp://127\.0\.0\.1: .*check (host, )?application and stream key")
    run.until(lambda: words.search(run.talk))
    run.until(lambda: words.search(run.target()["error"]))
    run.end()
    assert KEY not in run.talk


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_soak(streaming, nginx, tmp_path):
    """Ten minutes, five restarts of the server with up to ten seconds of absence each."""
    nginx.start()
    nginx.wait()
    run = start(streaming, nginx, tmp_path)
    run.until(lambda: is_live(run, 1))
    recoveries = []
    for absence in (0, 1, 3, 6, 10):
        time.sleep(96)
        recoveries.append(restart(run, nginx, absence, len(recoveries) + 2))
        print(f"absent {absence} s, back after {recoveries[-1]:.2f} s", file=sys.stderr, flush=True)
    time.sleep(96)
    sent = run.target()["sent"]
    run.until(lambda: run.target()["sent"] > sent + 6 * FPS)
    status = run.status()
    run.end()
    frames = check_recording(tmp_path / "rec.mp4", tmp_path / "s.json")
    print(f"{frames} frames made and recorded; {json.dumps(status)}", file=sys.stderr)
    assert max(recoveries) < 5
    target = json.loads((tmp_path / "s.json").read_text())["settings"]["live"]["targets"][0]
    assert target["connections"] == 6
    assert len(packets(nginx.whole())) > 0
    assert KEY not in run.talk
