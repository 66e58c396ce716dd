"""The panel's input line of a real `wanrt stream` in a real terminal: typed at, stopped, resumed, ended, killed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
WANRT = f"{sys.executable} -m wanrt stream 'a red ball' --random-weights --size 64x32 -o a.mp4"
# What a run leaves behind is looked at again and again: after a kill it takes a moment.
FOREGROUND = f"""trap : INT
stty -g >before
sh -c 'echo $$ >pid; exec {WANRT.replace("'", '"')}'
echo $? >code
while :; do stty -g >after.new; mv after.new after; sleep 0.1; done
"""


class Terminal:
    """A pane of tmux of 90 columns and 24 rows."""

    def __init__(self, place, command):
        self.place = place
        self.tmux("new-session", "-d", "-x", "90", "-y", "24", "-c", str(place), command)
        self.tmux("set", "-g", "status", "off")

    def tmux(self, *words):
        command = ["tmux", "-S", str(self.place / "tmux"), "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def shown(self):
        return self.tmux("capture-pane", "-p")

    @property
    def line(self):
        """The input line, "" where there is none."""
        return next((row[3:] for row in reversed(self.shown.splitlines()) if row.startswith(" > ")), "")

    def type(self, text):
        self.tmux("send-keys", "-l", text)

    def keys(self, *names):
        self.tmux("send-keys", *names)

    def until(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.1)

    def until_line(self, words):
        self.until(lambda: words in self.line)


@pytest.fixture
def terminal(tmp_path, runtime_directory):
    """Opens a terminal with a command in it."""
    opened = []

    def start(command):
        opened.append(Terminal(tmp_path, command))
        return opened[-1]

    yield start
    for one in opened:
        one.tmux("kill-server")


def read(path):
    return path.read_text().strip() if path.exists() else ""


@pytest.mark.parametrize(
    ("end", "code"),
    [("C-c", 130), (signal.SIGTERM, 143), (signal.SIGKILL, 137)],
    ids=["ctrl-c", "term", "kill"],
)
def test_the_terminal_has_its_mode_back(terminal, tmp_path, end, code):
    (tmp_path / "run.sh").write_text(FOREGROUND)
    screen = terminal("sh run.sh")
    screen.until_line("type a prompt")
    screen.until(lambda: " frames " in screen.shown)
    screen.type("a green star")
    screen.until_line("a green star")
    screen.keys("Enter")
    screen.until_line("from chunk")
    if isinstance(end, signal.Signals):
        os.kill(int(read(tmp_path / "pid")), end)
    else:
        screen.keys(end)
    screen.until(lambda: read(tmp_path / "code"))
    assert read(tmp_path / "code") == str(code)
    screen.until(lambda: read(tmp_path / "after") == read(tmp_path / "before"))
    assert screen.tmux("display", "-p", "#{pane_in_mode}").strip() == "0"
    screen.type("x")
    screen.until(lambda: screen.shown.rstrip().endswith("x"))  # it echoes again


def test_typed_commands_and_a_stop(terminal, tmp_path):
    """Wide characters, a paste, history, what is refused, Ctrl-Z and back."""
    from wanrt.pipeline.control import ask, find_run

    screen = terminal("bash --norc -i")
    screen.keys(WANRT, "Enter")
    screen.until_line("type a prompt")
    screen.until(lambda: " frames " in screen.shown)
    screen.type("a \u65e5\u672c star")
    screen.keys("Left", "Left", "Left", "Left", "Left", "BSpace", "BSpace", "\u00e9")
    screen.until_line("a \u00e9 star")
    screen.keys("Enter")
    screen.until_line("from chunk")
    screen.until(lambda: ask(find_run(None), "status")["prompt"] == "a \u00e9 star")

    screen.tmux("set-buffer", "one\ntwo\n")
    screen.tmux("paste-buffer", "-p")
    screen.until_line("one two")
    screen.keys("Escape")
    screen.until_line("type a prompt")

    for line, words in (
        ("/set bias=7", "bias: got "),
        ("/dance", "/dance: expected /blend"),
        ("/seed 9", "from chunk"),
        ("/pause", "paused; /resume goes on"),
    ):
        screen.type(line)
        screen.keys("Enter")
        screen.until_line(words)
    assert ask(find_run(None), "status")["seed"] == 9
    screen.until(lambda: ask(find_run(None), "status")["phase"] == "paused")
    screen.keys("Up", "Up")
    screen.until_line("/seed 9")
    screen.keys("C-u")
    screen.type("/blend 2s a moon")
    screen.until_line("/blend 2s a moon")

    screen.keys("C-z")
    screen.until(lambda: "Stopped" in screen.shown)
    screen.keys("echo in the shell", "Enter")
    screen.until(lambda: "\nin the shell" in screen.shown)
    screen.keys("fg", "Enter")
    screen.until(lambda: screen.shown.rstrip().endswith("> /blend 2s a moon"))
    screen.keys("Enter")
    screen.until_line("from chunk")
    screen.type("/resume")
    screen.keys("Enter")
    screen.until(lambda: ask(find_run(None), "status")["prompt"] == "a moon")
    screen.type("/stop")
    screen.keys("Enter")
    screen.until(lambda: "\u2713 a.mp4" in screen.shown)
