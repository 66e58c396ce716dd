"""What really reaches a terminal: through a pty and a small emulator, and through tmux where there is one."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console

from wanrt.panel import Summary
from wanrt.panel.live import BEGIN, END, LivePanel

SIZES = [(80, 24), (120, 40), (50, 15), (40, 8)]
SUMMARY = Summary("out.mp4", 240, 10.4, 23.1, 1_820_000, 15.0, 1.21, notes=("mesh 86 % busy, bubble 68 ms",))


class Stage:
    """A panel on an emulated screen, with a clock that is moved by hand."""

    def __init__(self, screen, columns, rows, **console):
        self.now = 100.0
        self.size = (columns, rows)
        self.foreground = True
        self.stream = io.StringIO()
        self.screen = screen(columns, rows)
        settings = {"color_system": "truecolor", "_environ": {}, **console}
        self.panel = LivePanel(
            self.stream,
            size=lambda: self.size,
            clock=lambda: self.now,
            console=Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), force_terminal=True, **settings),
            thread=False,
            foreground=lambda: self.foreground,
        )
        self.screen.feed("$ wanrt render prompt.toml -o out.mp4\n")

    def show(self, snapshot=None):
        if snapshot:
            self.panel.update(snapshot)
        self.panel.paint()
        return self.flush()

    def flush(self):
        data = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        self.screen.feed(data)
        return data


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_golden_run(screen, running, loading, golden, columns, rows):
    stage = Stage(screen, columns, rows)
    shots = []
    stage.show(loading)
    shots.append(stage.screen.text)
    stage.show(running(3.0))
    stage.panel.log("scene 2: a green star spinning")
    stage.show(running(7.3))
    stage.now += 0.25
    stage.show()
    shots.append(stage.screen.text)
    stage.panel.close(SUMMARY)
    stage.flush()
    shots.append(stage.screen.text)
    golden(f"run-{columns}x{rows}", ("=" * columns + "\n").join(shots))


def test_repeated_paints_neither_scroll_nor_grow(screen, running):
    stage = Stage(screen, 80, 24)
    for i in range(50):
        stage.now += 0.1
        stage.show(running(3 + i / 10, at_s=stage.now))
    assert stage.screen.scrolled == 0
    assert stage.screen.lines[0].startswith("$ wanrt")
    assert sum("Ball over the bay" in line for line in stage.screen.lines) == 1


def test_a_panel_at_the_bottom_scrolls_once_and_never_again(screen, running):
    stage = Stage(screen, 80, 24)
    stage.screen.feed("line\n" * 22)
    stage.show(running(5))
    scrolled = stage.screen.scrolled
    for i in range(20):
        stage.show(running(5 + i / 10))
    assert stage.screen.scrolled == scrolled


def test_an_unchanged_panel_writes_no_text(screen, running):
    stage = Stage(screen, 80, 24)
    rows = stage.show(running(5)).count("\n")
    assert stage.show() == f"{BEGIN}\r\x1b[{rows}A" + "\n" * rows + END


def test_log_lines_stay_above_in_order(screen, running):
    stage = Stage(screen, 80, 24)
    stage.show(running(5))
    for i in range(3):
        stage.panel.log(f"line {i}\x1b[2J", logging.WARNING)
        stage.show(running(5.5 + i))
    assert stage.screen.lines[1:5] == ["line 0 [2J", "line 1 [2J", "line 2 [2J", ""]
    assert "Ball over the bay" in stage.screen.lines[5]


def test_a_panel_in_the_background_leaves_the_screen_alone(screen, running):
    stage = Stage(screen, 80, 24)
    stage.foreground = False
    stage.show(running(5))
    assert "Ball over the bay" in stage.screen.text, "never in the foreground: there is no shell to disturb"
    stage.foreground = True
    stage.show(running(6))
    stage.foreground = False
    assert stage.show(running(7)) == ""
    stage.screen.feed("$ ls\na.mp4\n$ fg\n")
    stage.foreground = True
    stage.show(running(8))
    assert "$ fg" in stage.screen.text, "it begins below what others wrote"


def test_no_color_keeps_the_shape(screen, running):
    plain = Stage(screen, 80, 24, no_color=True)
    colour = Stage(screen, 80, 24)
    codes, coloured = plain.show(running(5)), colour.show(running(5))
    assert plain.screen.text == colour.screen.text
    assert "\x1b[36m" in coloured
    assert not any(f"\x1b[{code}" in codes for code in ("3", "4", "9"))
    assert "\x1b[7m" in codes


def test_a_narrower_terminal_is_repainted_whole(screen, running):
    stage = Stage(screen, 120, 40)
    rows = stage.show(running(5)).count("\n")
    stage.size = (60, 40)
    data = stage.show()
    up = int(data.removeprefix(f"{BEGIN}\r\x1b[").partition("A")[0])
    assert up > rows, "rows that the terminal has wrapped are counted"
    assert "\x1b[J" in data


CHILD = """
import sys, time
from wanrt.panel import *
observer = make_observer({mode!r})
stages = (StageRow('mesh', 0.5, 3.0, 'step', ((-0.5, 0.0),)),)
for i in range({paints}):
    observer.update(Snapshot(frames_done=12 * i, frames_total=120, elapsed_s=float(i), title='T',
                             stages=stages, warnings=('low disk',)))
    time.sleep(0.15)
observer.log('a line')
observer.close(Summary('out.mp4', 120, 4.0, 30.0, 1000))
"""


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_a_real_terminal_gets_the_panel(in_pty, screen, env):
    data, code = in_pty(CHILD.format(mode="auto", paints=4), 60, 20, **env)
    assert code == 0
    assert data.count(BEGIN) == data.count(END) >= 2
    assert ("\x1b[36m" in data) == (not env)
    after = screen(60, 20)
    after.feed(data)
    assert after.text == "a line\n✓ out.mp4  120 frames in 4.0 s  30.0 fps  0.98 KiB\n"


@pytest.mark.parametrize(
    ("mode", "env"), [("auto", {"TERM": "dumb"}), ("plain", {}), ("panel", {"TERM": "dumb"})]
)
def test_plain_lines_where_the_cursor_cannot_move(in_pty, mode, env):
    data, code = in_pty(CHILD.format(mode=mode, paints=2), **env)
    assert code == 0
    assert "\x1b" not in data
    assert "\r" not in data
    assert "warning: low disk" in data
    assert data.splitlines()[-1].startswith("+ out.mp4  120 frames in 4.0 s")


def test_json_lines_on_a_terminal(in_pty):
    data, code = in_pty(CHILD.format(mode="json", paints=2))
    assert code == 0
    assert [json.loads(line)["event"] for line in data.splitlines()] == [
        "progress",
        "progress",
        "log",
        "summary",
    ]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_tmux_is_left_clean_when_narrowed_under_the_panel(tmp_path):
    """The same bytes through a terminal that others wrote."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(mode="auto", paints=20) + "time.sleep(60)\n")

    def tmux(*words):
        command = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    tmux("new-session", "-d", "-x", "80", "-y", "20", f"{sys.executable} {script}")
    try:
        tmux("set", "-g", "status", "off")
        wait_for(lambda: "/120 frames" in tmux("capture-pane", "-p"))
        tmux("resize-window", "-x", "60", "-y", "20")
        wait_for(lambda: "✓ out.mp4" in tmux("capture-pane", "-p"))
        shown = tmux("capture-pane", "-p").rstrip()
    finally:
        tmux("kill-server")
    assert shown == "a line\n✓ out.mp4  120 frames in 4.0 s  30.0 fps  0.98 KiB"


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)
