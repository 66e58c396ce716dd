from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from wanrt.panel.snapshot import LoadStep, Memory, Phase, Queue, Snapshot, StageRow

HERE = Path(__file__).parent
PERIOD, MESH, ANCHOR, SHOW = 0.52, 0.44, 0.07, 0.11


class Screen:
    """A terminal of the kind the panel needs: text, newline, carriage return, up, erase line, erase below."""

    TOKEN = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.lines = [""] * rows
        self.x = self.y = self.scrolled = 0

    def feed(self, data):
        position = 0
        while position < len(data):
            token = self.TOKEN.match(data, position)
            assert token, f"unknown escape at {data[position : position + 20]!r}"
            position = token.end()
            self.obey(*token.groups())

    def obey(self, private, argument, final, carriage, newline, text):
        if text:
            for character in text:
                self.put(character)
        elif carriage:
            self.x = 0
        elif newline:
            self.x = 0
            self.down()
        elif private:
            assert (argument, final) in {("2026", "h"), ("2026", "l")}
        elif final == "A":
            self.y = max(0, self.y - int(argument or 1))
        elif final == "K":
            self.lines[self.y] = self.lines[self.y][: self.x]
        elif final == "J":
            self.lines[self.y :] = [self.lines[self.y][: self.x], *[""] * (self.rows - self.y - 1)]
        else:
            assert final == "m", f"unexpected CSI {argument}{final}"

    def put(self, character):
        if self.x == self.columns:
            self.x = 0
            self.down()
        line = self.lines[self.y].ljust(self.x)
        self.lines[self.y] = line[: self.x] + character + line[self.x + 1 :]
        self.x += 1

    def down(self):
        if self.y == self.rows - 1:
            self.lines = [*self.lines[1:], ""]
            self.scrolled += 1
        else:
            self.y += 1

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.lines).rstrip() + "\n"


@pytest.fixture
def screen():
    return Screen


def stage_rows(t):
    """Blocks of a run at second `t`, as a real one has them: chunk after chunk, the anchor between two."""
    starts = [k * PERIOD for k in range(int(t / PERIOD) + 1)]
    mesh = [(s, min(t, s + MESH)) for s in starts]
    anchor = [(s + MESH, min(t, s + MESH + ANCHOR)) for s in starts if s + MESH < t]
    shown = [(s + PERIOD, min(t, s + PERIOD + SHOW)) for s in starts if s + PERIOD < t]
    coded = [(b, min(t, b + 0.06)) for _, b in shown if b < t]

    def row(name, share, bubble, last, blocks):
        return StageRow(name, share, bubble, last, tuple((a - t, b - t) for a, b in sorted(blocks)))

    return (
        row("mesh", 0.86, 68.0, "step 3", mesh),
        row("stage0", 0.31, None, "decode", anchor + shown),
        row("encoder", 0.12, None, "encode", coded),
    )


@pytest.fixture(scope="session")
def running():
    """A running snapshot at second `t`; keywords replace its fields."""

    def make(t=7.3, **changes):
        chunk = int(t / PERIOD)
        fields = {
            "elapsed_s": t + 1.2,
            "title": "Ball over the bay",
            "subtitle": "krea-14b 832x480 seed 7",
            "output": "out.mp4",
            "frames_done": max(0, 12 * chunk - 3),
            "frames_total": 240,
            "fps_target": 16.0,
            "fps_now": 23.8,
            "fps_mean": 22.9,
            "time_to_first_frame_s": 1.21,
            "chunk": chunk,
            "period_s": PERIOD,
            "stages": stage_rows(t),
            "queues": (Queue("latents", 1, 2), Queue("frames", 3, 8)),
            "memory": Memory(int(3.1 * 2**30), int(61.3 * 2**30), 80 * 2**30),
            "scene": 2,
            "scenes": 3,
            "prompt": "a green star spinning slowly above a calm blue bay at night, reflections on water",
            "blend_from": "a red ball bouncing over a blue night sky",
            "blend": 0.4,
            "encoder_lag_s": 0.12,
            "warnings": ("prompt 3 was cut at 512 tokens",),
        }
        return Snapshot(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def loading():
    return Snapshot(
        phase=Phase.LOADING,
        elapsed_s=4.2,
        title="Ball over the bay",
        subtitle="krea-14b 832x480 seed 7",
        load=(
            LoadStep("text encoder", "done", 1.0, "10.6 GiB", 2.1),
            LoadStep("transformer", "active", 0.61, "8.4 of 13.9 GiB", 2.1),
            LoadStep("VAE"),
            LoadStep("warm-up"),
        ),
    )


@pytest.fixture(scope="session")
def golden():
    """Compare with tests/panel/golden/NAME.txt; WANRT_UPDATE_GOLDEN=1 writes it instead."""

    def check(name, text):
        path = HERE / "golden" / f"{name}.txt"
        if os.environ.get("WANRT_UPDATE_GOLDEN"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture
def in_pty():
    """Run `python -c code` with a terminal of that size as its stderr; what it wrote there, and its exit code."""

    def run(code, columns=80, rows=24, **env):
        parent, child = os.openpty()
        termios.tcsetwinsize(child, (rows, columns))
        mode = termios.tcgetattr(child)
        mode[1] &= ~termios.OPOST  # no newline translation: see exactly what was written
        termios.tcsetattr(child, termios.TCSANOW, mode)
        hidden = ("NO_COLOR", "COLORTERM", "TERM", "COLUMNS", "LINES")
        base = {k: v for k, v in os.environ.items() if k not in hidden} | {"TERM": "xterm"} | env
        process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=child, stdout=subprocess.DEVNULL, env=base
        )
        os.close(child)
        data = b"".join(iter(lambda: read(parent), b""))
        os.close(parent)
        return data.decode(), process.wait(20)

    return run


def read(handle):
    """The next bytes of a pty; none once its other end is closed, which Linux reports as EIO."""
    try:
        return os.read(handle, 65536)
    except OSError:
        return b""
