from __future__ import annotations

import io
import json
import logging
import warnings
from dataclasses import replace

import pytest
from rich.console import Console

from wanrt.errors import UsageError
from wanrt.panel import Summary, delay, logging_to, make_observer, memory_now, stage_rows
from wanrt.panel.live import LivePanel
from wanrt.panel.observer import SafeObserver
from wanrt.panel.plain import JsonLines, PlainLines, QuietLines
from wanrt.telemetry import Recorder


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_plain_lines_come_every_five_seconds_and_at_events(running, loading, clock):
    stream = io.StringIO()
    plain = PlainLines(stream, clock=clock)
    plain.update(loading)
    for tenth in range(120):
        clock.now = tenth / 10
        scene = 1 if clock.now < 7 else 2
        plain.update(running(3 + clock.now, scene=scene, prompt="a\nstar", warnings=()))
    plain.close(Summary("out.mp4", 90, 12.0, 7.5, stopped="SIGINT"))
    lines = stream.getvalue().splitlines()
    starts = ["[0:04] l", "scene 1:", "[0:04] 5", "[0:09] 1", "scene 2:", "[0:11] 2", "# out.mp"]
    assert [line[:8] for line in lines] == starts
    assert lines[0] == "[0:04] loading transformer 61 % (8.4 of 13.9 GiB)"
    assert lines[4] == "scene 2: a star"
    assert lines[-1] == "# out.mp4  90 frames in 12.0 s  7.50 fps  stopped: SIGINT"
    assert "\r" not in stream.getvalue()


def test_plain_lines_survive_a_narrow_encoding(running, clock):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainLines(stream, clock=clock).update(running(prompt="红球"))
    assert b"scene 2: ??" in raw.getvalue()


def test_json_lines_follow_their_schema(running, loading, clock):
    stream = io.StringIO()
    observer = JsonLines(stream, clock=clock)
    observer.update(loading)
    for tenth in range(20):
        clock.now = tenth / 10
        observer.update(running(3 + clock.now))
    observer.log("careful", logging.WARNING)
    observer.close(Summary("out.mp4", 240, 10.4, 23.1))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(e["schema"] == 1 and e["t"] >= 0 for e in events)
    assert [e["event"] for e in events] == ["progress"] * 5 + ["log", "summary"]
    assert events[0]["phase"] == "loading"
    step = {
        "name": "transformer",
        "state": "active",
        "fraction": 0.61,
        "detail": "8.4 of 13.9 GiB",
        "seconds": 2.1,
    }
    assert events[0]["load"][1] == step
    assert events[1]["frames_total"] == 240
    assert events[1]["eta_s"] == pytest.approx((240 - events[1]["frames_done"]) / 23.8)
    assert "blocks" not in events[1]["stages"][0]
    assert events[-2]["level"] == "warning"
    assert events[-1]["frames"] == 240


def test_quiet_speaks_only_of_trouble(running, clock):
    stream = io.StringIO()
    quiet = QuietLines(stream, clock=clock)
    quiet.update(running())
    quiet.log("hello")
    quiet.log("disk is full", logging.ERROR)
    quiet.close(Summary("out.mp4", 240, 10.4))
    assert stream.getvalue() == "error: disk is full\n"


def test_unknown_mode():
    with pytest.raises(UsageError, match=r"'fancy': expected one of auto, panel"):
        make_observer("fancy", io.StringIO())


def test_without_a_terminal_auto_means_plain(running):
    stream = io.StringIO()
    observer = make_observer("auto", stream, env={"TERM": "xterm"})
    observer.update(running())
    assert "frames" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


class Broken:
    def update(self, *_):
        raise ZeroDivisionError("boom")

    log = close = update


def test_a_failing_panel_is_reported_and_replaced(running, clock, caplog):
    stream = io.StringIO()
    observer = SafeObserver(Broken(), PlainLines(stream, clock=clock))
    with caplog.at_level(logging.DEBUG, "wanrt.panel"):
        observer.update(running())
    words = "warning: Broken failed (ZeroDivisionError: boom); the run goes on with plain lines\n"
    assert stream.getvalue().startswith(words)
    assert "165/240 frames" in stream.getvalue()
    assert caplog.records[0].exc_info is not None


def test_when_everything_fails_the_run_still_goes_on(running):
    observer = SafeObserver(Broken(), Broken())
    observer.update(running())
    observer.log("x")
    observer.close()


def test_an_error_in_the_painting_thread_reaches_the_next_call(running, clock):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    stream = io.StringIO()
    panel = LivePanel(Gone(), size=lambda: (80, 24), clock=clock, console=Console(file=io.StringIO()))
    observer = SafeObserver(panel, PlainLines(stream, clock=clock))
    observer.update(running())
    panel._thread.join(5)
    observer.update(running())
    assert "LivePanel failed (OSError" in stream.getvalue()
    assert "165/240 frames" in stream.getvalue()


def test_interrupts_are_not_swallowed(running):
    class Interrupted(Broken):
        def update(self, snapshot):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeObserver(Interrupted(), None).update(running())


def test_log_records_and_warnings_go_to_the_observer(clock):
    stream = io.StringIO()
    logger = logging.getLogger("wanrt.test")
    with logging_to(PlainLines(stream, clock=clock)):
        logger.warning("slow %s", "disk")
        logger.info("hidden")
        warnings.warn("old call", UserWarning, stacklevel=1)
    assert stream.getvalue().startswith("warning: slow disk\n")
    assert not logging.getLogger("wanrt").handlers


def test_rows_come_from_a_recorder():
    now = [10_000_000_000]
    recorder = Recorder(clock=lambda: now[0])
    for chunk in range(3):
        with recorder.span("mesh", "chunk", chunk):
            for step in range(4):
                with recorder.span("mesh", "step", chunk, step=step):
                    now[0] += 100_000_000
        with recorder.span("stage0", "decode", chunk):
            now[0] += 50_000_000
    with recorder.span("mesh", "chunk", 3):
        now[0] += 30_000_000
        mesh, stage0 = stage_rows(recorder, recorder.stats())
    assert mesh.name == "mesh"
    assert mesh.bubble_ms == pytest.approx(50)
    assert mesh.blocks[-1] == pytest.approx((-0.03, 0.0))
    assert mesh.blocks[-2] == pytest.approx((-0.48, -0.08))
    assert (mesh.chunk, mesh.last) == (3, "chunk")
    assert stage0.bubble_ms is None
    assert len(stage0.blocks) == 3


def test_rows_of_several_ranks_carry_their_names():
    now = [0]
    books = Recorder(clock=lambda: now[0])
    for rank in ("mesh1", "mesh0"):
        other = Recorder(clock=lambda: now[0], rank=rank)
        for stage in ("mesh", "decode"):
            with other.span(stage, "step", 0):
                now[0] += 10_000_000
        books.absorb(other.drain())
    names = [row.name for row in stage_rows(books, books.stats())]
    assert delay(books, books.stats()) == 0
    books.frames(0, 9)
    now[0] += 400_000_000
    books.frames(1, 12)
    assert delay(books, books.stats()) == pytest.approx(0.5)
    assert names == ["mesh0", "mesh1", "decode mesh0", "decode mesh1"]


def test_loading_is_told_once_a_step_and_a_scene_once(loading, running, clock):
    stream = io.StringIO()
    plain = PlainLines(stream, clock=clock)
    plain.update(replace(loading, load=()))
    for _ in range(5):
        plain.update(loading)
    plain.update(running(frames_done=0, warnings=()))
    plain.update(running(frames_done=9, warnings=()))
    text = stream.getvalue()
    assert text.count("loading") == 1
    assert text.count("scene 2: ") == 1
    assert len(text.splitlines()) == 4


def test_memory_counts_this_process():
    assert memory_now().rss > 10_000_000


def test_a_prompt_of_ten_thousand_characters_takes_a_short_line(running, clock):
    stream = io.StringIO()
    observer = PlainLines(stream, clock=clock)
    observer.update(running(prompt="ball " * 2000))
    (line,) = (line for line in stream.getvalue().splitlines() if line.startswith("scene"))
    assert line.startswith("scene 2: ball ball")
    assert len(line) < 220
    assert line.endswith("...")
