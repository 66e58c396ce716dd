"""`wanrt render` from the command line to a file that another decoder reads."""

import json
import signal
import time

import numpy as np
import pytest

PROMPT = "a red ball bouncing"


def wait_for(condition, process, seconds=60):
    """Polls until `condition()`; fails when the process ends or time runs out."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def frames_delivered(process, count):
    """Reads a --json-progress run until it has made `count` frames."""
    for line in process.stderr:
        if json.loads(line).get("frames_done", 0) >= count:
            return
    pytest.fail("the run ended early")


def test_a_prompt_becomes_a_file(wanrt, decode, tmp_path):
    out = tmp_path / "x.mp4"
    done = wanrt("render", PROMPT, "-o", out, "--duration", "2s", "--fps", "16", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    frames, meta = decode(out)
    assert frames.shape == (32, 48, 64, 3)
    assert meta["fps"] == 16
    assert meta["duration"] == pytest.approx(2.0, abs=0.02)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x.mp4"]


def test_a_file_with_scenes(wanrt, decode, tmp_path):
    script = tmp_path / "two.toml"
    script.write_text(
        'title = "Two"\npreset = "wan-tiny"\nfps = "24000/1001"\nseed = 5\n'
        '[[scene]]\nprompt = "a ball"\nduration = "1s"\n'
        '[[scene]]\nprompt = { "a star" = 0.7, "a sunset" = 0.3 }\nduration = "1s"\n'
        'transition = { over = "0.5s", curve = "slerp" }\n'
    )
    done = wanrt("render", script, "-o", tmp_path / "x.mkv", "--quiet")
    assert done.returncode == 0, done.stderr
    frames, meta = decode(tmp_path / "x.mkv")
    assert len(frames) == 48
    assert meta["fps"] == pytest.approx(23.976, abs=0.01)


def test_the_same_command_twice_and_a_prefix(wanrt, decode, tmp_path):
    for name, frames in (("a", "3"), ("b", "3"), ("short", "2")):
        done = wanrt(
            "render", PROMPT, "-o", f"{tmp_path}/{name}/%03d.png", "--chunks", frames, "--seed", "9", "-q"
        )
        assert done.returncode == 0, done.stderr
    files = {name: sorted((tmp_path / name).iterdir()) for name in ("a", "b", "short")}
    assert [len(found) for found in files.values()] == [33, 33, 21]
    assert [p.read_bytes() for p in files["a"]] == [p.read_bytes() for p in files["b"]]
    pixels = [decode(p)[0] for p in (files["a"][20], files["short"][20], files["a"][21])]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


@pytest.mark.slow
def test_policies_give_the_same_pixels(wanrt, tmp_path):
    policies = ("decode-all", "overlap", "anchor-only")
    for anchor in policies:
        out = f"{tmp_path}/{anchor}/%03d.png"
        done = wanrt("render", PROMPT, "-o", out, "--chunks", "3", "--anchor", anchor, "-q")
        assert done.returncode == 0, done.stderr
    first, *others = [[p.read_bytes() for p in sorted((tmp_path / d).iterdir())] for d in policies]
    assert len(first) == 33
    assert all(other == first for other in others)


def test_progress_stats_and_trace(wanrt, events, tmp_path):
    stats, trace = tmp_path / "s.json", tmp_path / "t.json"
    measured = ["--json-progress", "--stats", stats, "--trace", trace]
    done = wanrt("render", PROMPT, "-o", tmp_path / "x.mp4", "--chunks", "3", *measured)
    assert done.returncode == 0, done.stderr
    lines = events(done.stderr)
    progress = [line for line in lines if line["event"] == "progress"]
    assert progress[0]["phase"] == "loading"
    assert progress[-1]["frames_done"] == progress[-1]["frames_total"] == 33
    assert lines[-1]["event"] == "summary"
    assert lines[-1]["frames"] == 33

    report = json.loads(stats.read_text())
    assert report["settings"]["preset"] == "wan-tiny"
    assert report["settings"]["random_weights"] is True
    assert report["stats"]["frames"] == 33
    assert report["stats"]["chunks"] == 3
    stages = {stage["stage"]: stage["spans"] for stage in report["stats"]["stages"]}
    assert {"text-encode", "anchor-decode", "anchor-encode", "display-decode", "convert"} <= set(
        stages["stage0"]
    )
    assert {"context", "step"} <= set(stages["mesh"])
    assert {"encode", "mux"} <= set(stages["encoder"])
    assert stages["mesh"]["step"]["count"] == 12
    assert stages["mesh"]["context"]["count"] == 2

    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {"step", "context", "anchor-decode", "encode"} <= {span["name"] for span in spans}
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_in_a_finished_file(wanrt, decode, tmp_path, signum, code):
    out = tmp_path / "x.mp4"
    process = wanrt.start("render", PROMPT, "-o", out, "--duration", "1h", "--json-progress")
    frames_delivered(process, 21)
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    summary = json.loads(
        err.splitlines()[-2] if "summary" not in err.splitlines()[-1] else err.splitlines()[-1]
    )
    assert signal.Signals(signum).name in err
    frames, _ = decode(out)
    assert len(frames) >= 21
    assert (len(frames) - 9) % 12 == 0
    assert summary["frames"] == len(frames)
    assert not list(tmp_path.glob(".*"))


def test_sigkill_leaves_a_playable_part(wanrt, decode, tmp_path):
    process = wanrt.start("render", PROMPT, "-o", tmp_path / "x.mp4", "--duration", "1h", "--json-progress")
    frames_delivered(process, 45)
    process.kill()
    process.communicate(timeout=30)
    assert not (tmp_path / "x.mp4").exists()
    (part,) = tmp_path.glob(".x.mp4.*.part.mp4")
    frames, _ = decode(part)
    assert len(frames) >= 21


def test_nothing_is_loaded_for_a_target_that_is_there(wanrt, tmp_path):
    out = tmp_path / "x.mp4"
    out.write_bytes(b"mine")
    began = time.monotonic()
    done = wanrt("render", PROMPT, "-o", out)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert out.read_bytes() == b"mine"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda:7"], "CUDA devices here"),
        (["--device", "tpu"], "expected auto, cpu, cuda"),
        (["--topology", "tp=3"], "8 % 3"),
        (["--stats", "/nonexistent/s.json"], "/nonexistent"),
        (["-o", "/nonexistent/x.mp4"], "/nonexistent"),
        (["-o", "x.xyz"], ".xyz"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(wanrt, tmp_path, flags, words):
    done = wanrt("render", PROMPT, "-o", tmp_path / "x.mp4", "--chunks", "1", "-q", *flags)
    assert done.returncode in (1, 2), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(tmp_path.glob("*.mp4"))


def test_missing_weights_are_named_before_anything_is_made(wanrt, tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "wanrt", "render", PROMPT, "-o", str(tmp_path / "x.mp4"), "--preset", "krea-14b",
         "--weights", str(tmp_path), "-q"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "krea" in done.stderr
    assert "Traceback" not in done.stderr
