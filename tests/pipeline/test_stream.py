"""`stream` around a pipeline of grey frames: steered, paused, stopped, interrupted; nothing secret anywhere."""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from wanrt.errors import UsageError
from wanrt.pipeline import assemble
from wanrt.pipeline.cancel import CancelledError, StoppedError
from wanrt.pipeline.control import ask, find_run, runs
from wanrt.pipeline.live import LiveTimeline
from wanrt.pipeline.loop import Frames
from wanrt.pipeline.session import Session
from wanrt.pipeline.stream import StreamPlan, stream
from wanrt.pipeline.watch import FileWatch
from wanrt.script import RenderJob, Timeline, load_preset
from wanrt.script.live import plan_stream

KEY = "s3cr3t-k3y"
URL = f"rtmp://127.0.0.1:9/live/{KEY}?auth=hush-hush"  # port 9: nobody is there


class Watcher:
    def __init__(self):
        self.lines, self.snapshots, self.summary = [], [], None

    def update(self, snapshot):
        self.snapshots.append(snapshot)

    def log(self, line, level=0):
        self.lines.append(line)

    def typing(self, typed):
        return False

    def close(self, summary=None):
        self.summary = summary


class FakePipeline:
    """Asks for conditioning one chunk ahead, as the real one does; a chunk takes 50 ms."""

    def __init__(self, job):
        self.job, self.asked = job, []

    def run(self):
        first, chunk = 0, 0
        while self.job.chunks is None or chunk < self.job.chunks:
            self.asked.append(self.job.timeline.at(chunk))
            time.sleep(0.05)
            count = 12 if chunk else 9
            yield Frames(torch.full((count, 32, 64, 3), chunk % 200, dtype=torch.uint8), chunk, first, count)
            first, chunk = first + count, chunk + 1

    def check(self):
        """No rank of this one fails."""

    def close(self):
        pass


@pytest.fixture
def job():
    preset = load_preset("wan-tiny")
    return RenderJob(
        preset=preset, timeline=Timeline.of("a red ball"), seed=3, width=64, height=32, fps=Fraction(96), frames=None,
        steps=preset.steps, window=3, bias=1.0, anchor="anchor-only", random_weights=True, device="cpu",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder) / "wanrt"


@pytest.fixture
def streaming(monkeypatch, job):
    """Starts a stream on a thread; gives what steers it, and `end`."""
    started = []

    class Stream:
        def __init__(self, job=job, **plan):
            self.observer, self.pipelines, self.error, self.result = Watcher(), [], None, None
            self.job, self.plan = job, StreamPlan(**plan)
            monkeypatch.setattr(assemble, "build_pipeline", self.build)
            self.thread = threading.Thread(target=self.work)
            self.thread.start()

        def build(self, job, *args):
            self.pipelines.append(FakePipeline(job))
            return self.pipelines[-1]

        def work(self):
            try:
                self.result = stream(self.job, self.plan, self.observer)
            except Exception as error:
                self.error = error

        def ask(self, command, **fields):
            return ask(find_run(self.plan.name), command, **fields)

        def until(self, condition):
            deadline = time.monotonic() + 60
            while not condition():
                assert self.thread.is_alive(), self.error
                assert time.monotonic() < deadline
                time.sleep(0.02)

        def running(self):
            self.until(lambda: self.plan.name in runs() and (self.ask("status")["chunk"] or 0) > 1)

        def end(self):
            self.ask("stop")
            self.thread.join(60)
            assert self.error is None
            return self.result

    def start(**kwargs):
        started.append(Stream(**kwargs))
        return started[-1]

    yield start
    for one in started:
        if one.thread.is_alive():
            one.ask("stop")
            one.thread.join(60)


def frames_in(path):
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_prompt_said_is_what_the_next_chunks_show(streaming, tmp_path):
    run = streaming(targets=(f"{tmp_path}/a.m3u8",))
    run.running()
    before = run.ask("status")["chunk"]
    chunk = run.ask("say", prompt="a green star", blend="0s")["chunk"]
    assert chunk >= before
    run.until(lambda: run.ask("status")["prompt_to_pixel_s"] is not None)
    status = run.ask("status")
    assert 0 < status["prompt_to_pixel_s"] < 30
    assert status["chunk"] >= chunk
    run.end()
    asked = run.pipelines[0].asked
    assert [now.text for now in asked[chunk : chunk + 2]] == ["a green star"] * 2
    assert asked[chunk - 1].text == "a red ball"


def test_blend_bias_steps_and_seed(streaming, tmp_path):
    run = streaming(targets=(f"{tmp_path}/a.m3u8",))
    run.running()
    chunk = run.ask("say", prompt={"a star": 3, "a moon": 1}, blend=1)["chunk"]
    run.ask("set", bias="0.3", steps=2)
    last = run.ask("seed", seed=9)["chunk"]
    run.until(lambda: run.ask("status")["chunk"] > last + 1)
    assert run.ask("status")["seed"] == 9
    run.end()
    asked = run.pipelines[0].asked
    assert asked[chunk].blend_from == (("a red ball", 1.0),)
    assert asked[chunk].blend_fraction == pytest.approx(6 / 96)
    assert dict(asked[chunk].prompts) == {"a star": 0.75, "a moon": 0.25}
    assert (asked[last].bias, len(asked[last].steps), asked[last].seed) == (0.3, 2, 9)


@pytest.mark.parametrize(
    ("command", "fields", "words"),
    [
        ("say", {}, "prompt: got None; expected text"),
        ("say", {"prompt": " "}, "prompt: got"),
        ("say", {"prompt": "x", "blend": "soon"}, "blend: got \"soon\"; expected a duration"),
        ("say", {"prompt": "x", "rtmp": 1}, "it takes blend, prompt"),
        ("set", {"bias": 7}, "bias: got 7; expected a KV attention bias"),
        ("set", {}, "nothing given"),
        ("seed", {"seed": -1}, "seed: got -1"),
        ("dance", {}, "expected one of say, set, seed, pause, resume, stop, status"),
    ],
)  # fmt: skip
def test_refusals(job, command, fields, words):
    from wanrt.pipeline.session import Commands

    session = Session(job, LiveTimeline(job.timeline))
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        Commands(session, dict)(command, fields)


def test_pause_resume_stop(streaming, tmp_path):
    run = streaming(targets=(f"{tmp_path}/a.mp4", f"{tmp_path}/a.m3u8"))
    run.running()
    run.ask("pause")
    run.until(lambda: run.ask("status")["phase"] == "paused")
    time.sleep(0.2)
    here = run.ask("status")["frames"]
    time.sleep(0.4)
    held = run.ask("status")
    assert held["frames"] == here
    assert held["live"]["repeated"] > 0, "viewers see the last frame"
    run.ask("resume")
    run.until(lambda: run.ask("status")["frames"] > here)
    result = run.end()
    assert frames_in(tmp_path / "a.mp4") == result.frames
    assert result.outputs == (f"{tmp_path}/a.mp4", f"{tmp_path}/a.m3u8")
    assert runs() == []


def test_a_paused_stream_can_be_stopped(streaming, tmp_path):
    run = streaming(targets=(f"{tmp_path}/a.mp4",))
    run.running()
    run.ask("pause")
    run.end()
    assert frames_in(tmp_path / "a.mp4") > 0


def test_a_length_ends_it(monkeypatch, job, tmp_path):
    monkeypatch.setattr(assemble, "build_pipeline", lambda job, *args: FakePipeline(job))
    plan = StreamPlan(targets=(f"{tmp_path}/a.mp4",))
    result = stream(replace(job, frames=33), plan, Watcher())
    assert (result.frames, result.chunks, frames_in(tmp_path / "a.mp4")) == (33, 3, 33)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_recording(monkeypatch, job, tmp_path, signum):
    class Interrupted(FakePipeline):
        def run(self):
            for frames in super().run():
                yield frames
                if frames.chunk == 3:
                    os.kill(os.getpid(), signum)

    monkeypatch.setattr(assemble, "build_pipeline", lambda job, *args: Interrupted(job))
    observer = Watcher()
    with pytest.raises(CancelledError) as ended:
        stream(job, StreamPlan(targets=(f"{tmp_path}/a.mp4", f"{tmp_path}/a.m3u8")), observer)
    assert ended.value.exit_code == 128 + signum
    assert frames_in(tmp_path / "a.mp4") == 57, "all chunks that were made"
    assert signal.Signals(signum).name in observer.summary.stopped
    assert runs() == []


def test_keys_are_nowhere(monkeypatch, job, tmp_path, caplog, capfd):
    """An address nobody answers at, a recording, statistics, a trace: none of them knows the key."""
    monkeypatch.setattr(assemble, "build_pipeline", lambda job, *args: FakePipeline(job))
    observer, addresses = Watcher(), []
    plan = StreamPlan(targets=(URL, f"{tmp_path}/a.mp4", f"{tmp_path}/a.m3u8"), serve=("127.0.0.1", 0))
    timed = replace(job, frames=69, stats=tmp_path / "s.json", trace=tmp_path / "t.json")

    with caplog.at_level(logging.DEBUG):
        result = stream(timed, plan, observer, announce=addresses.append)
    said = json.dumps([str(snapshot) for snapshot in observer.snapshots])
    page = addresses[0].rsplit("/", 2)[1]
    everything = [
        caplog.text,
        *capfd.readouterr(),
        said,
        *observer.lines,
        str(observer.summary),
        repr(plan),
        str(result),
    ]
    everything += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    for secret in (KEY, "hush-hush", "/live/"):
        assert not [text[:200] for text in everything if secret in text], secret
    assert "rtmp://127.0.0.1" in said
    assert not [text for text in everything if page in text], "nor the page's token"
    assert json.loads((tmp_path / "s.json").read_text())["settings"]["live"]


def test_a_saved_file_is_followed_and_a_broken_edit_is_not(tmp_path, job):
    from wanrt.script import build_job, read_script

    file, lines = tmp_path / "p.toml", []
    file.write_text('[[scene]]\nprompt = "a ball"\n')
    live = LiveTimeline(build_job(read_script(str(file))).timeline)
    session = Session(replace(build_job(read_script(str(file))), timeline=live), live)
    watch = FileWatch(
        file,
        lambda: build_job(read_script(str(file))),
        session.follow,
        lambda line, level: lines.append(line),
        session.fixed,
    )

    def saved(text, words):
        file.write_text(text)
        deadline = time.monotonic() + 20
        while not any(words in line for line in lines):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)

    try:
        assert live.at(0).text == "a ball"
        saved('[[scene]]\nprompt = "a star"\nbias = 0.5\n', "read again, shown from chunk 1")
        assert (live.at(1).text, live.at(1).bias) == ("a star", 0.5)
        saved("[[scene]]\nprompt = \n", "not used")
        time.sleep(1.2)
        assert sum("not used" in line for line in lines) == 1, "reported once"
        assert live.at(2).text == "a star"
        saved('seed = 4\n[[scene]]\nprompt = "the sea again"\n', "from chunk 3")
        assert (live.at(3).text, live.at(3).seed) == ("the sea again", 4)
        assert not [line for line in lines if "restart" in line]
        saved('size = "128x64"\nduration = "9s"\n[[scene]]\nprompt = "a moon"\n', "size, duration: as before")
        assert live.at(4).text == "a moon", "what can change has changed"
        saved('fps = 30\n[[scene]]\nprompt = "a sun"\n', "fps: cannot change while it streams")
        assert live.at(5).text == "a moon"
    finally:
        watch.close()


def plan(*args, **kwargs):
    return plan_stream("a ball", {}, *args, **kwargs)


def test_how_long_it_goes_on(tmp_path):
    file = tmp_path / "p.toml"
    scene = '[[scene]]\nprompt = "a ball"\nduration = "2s"\n'
    file.write_text(scene)
    assert plan_stream(str(file), {})[0].frames is None
    assert plan_stream(str(file), {"duration": "3s"})[0].frames == 48
    file.write_text('duration = "4s"\n' + scene)
    assert plan_stream(str(file), {})[0].frames == 64
    assert plan_stream(str(file), {}, endless=True)[0].frames is None
    assert plan()[0].frames is None


def test_what_is_asked_for():
    _, got = plan(rtmp=[URL], outputs=["a.mp4"], serve="0.0.0.0:81", latency="500ms", pace="blend", name="x")
    assert got.targets == (URL, "a.mp4")
    assert (got.serve, got.latency, got.pace, got.name, got.exact_name) == (
        ("0.0.0.0", 81),
        0.5,
        "blend",
        "x",
        True,
    )
    assert plan(serve="0")[1].serve == ("127.0.0.1", 0)
    assert KEY not in repr(got)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rtmp": [f"http://h/{KEY}"]}, "--rtmp: got scheme \"http\", expected rtmp://HOST/APP/KEY"),
        ({"rtmp": [KEY]}, "--rtmp: got no scheme"),
        ({"pace": "fast"}, "--pace: got \"fast\"; expected a pace: one of repeat, slow, blend"),
        ({"latency": "0"}, "--latency: got"),
        ({"latency": "2h"}, "--latency: got \"2h\"; expected a time from 0.1s to 60s"),
        ({"serve": "99999"}, "--serve: got \"99999\"; expected a port"),
        ({"watch": True}, "--watch: \"a ball\" is no file"),
        ({"name": "a/b"}, "run name 'a/b'"),
    ],
)  # fmt: skip
def test_what_is_refused(kwargs, words):
    with pytest.raises(UsageError) as refused:
        plan(**kwargs)
    assert words in str(refused.value)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("targets", "words"),
    [((), "nowhere to stream to"), ((f"rtmp://h/{KEY}",), "stream key is missing"), (("a.xyz",), "extension"),
     ((f"ftp://h/{KEY}",), "scheme 'ftp'"), (("same.mp4", "same.mp4"), "named twice")],
)  # fmt: skip
def test_targets_are_checked_first(job, targets, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as refused:
        stream(job, StreamPlan(targets=targets), Watcher())
    assert KEY not in str(refused.value)


def test_an_address_is_no_prompt():
    with pytest.raises(UsageError, match="got an address where the prompt belongs") as refused:
        plan_stream(URL, {})
    assert KEY not in str(refused.value)


def test_a_stop_while_it_loads(monkeypatch, job, tmp_path):
    def load(job, files, device, wiring):
        ask(find_run(None), "stop")
        wiring.check()

    monkeypatch.setattr(assemble, "build_pipeline", load)
    with pytest.raises(StoppedError) as stopped:
        stream(job, StreamPlan(targets=(f"{tmp_path}/a.mp4",)), Watcher())
    assert stopped.value.exit_code == 0
    assert not list(tmp_path.iterdir())
    assert runs() == []


def test_without_a_runtime_directory(monkeypatch, recwarn):
    from wanrt.pipeline.control import runtime_directory

    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_directory().name == f"wanrt-{os.getuid()}"
    assert not recwarn.list
