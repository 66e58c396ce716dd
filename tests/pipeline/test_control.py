"""The control socket: who may use it, what goes over it, how runs are told apart."""

import json
import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from wanrt.errors import RunError, UsageError
from wanrt.pipeline import control
from wanrt.pipeline.control import ControlServer, ask, find_run, name_for, runs


@pytest.fixture
def place():
    """A runtime directory with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        yield Path(folder) / "wanrt"


@pytest.fixture
def server(place):
    """Starts servers that echo, and closes them."""
    started = []

    def echo(command, fields):
        if command == "refuse":
            raise UsageError("no")
        if command == "break":
            raise ZeroDivisionError
        return {"command": command, **fields}

    def start(name="demo", **kwargs):
        started.append(ControlServer(name, kwargs.pop("handle", echo), directory=place, **kwargs))
        return started[-1]

    yield start
    for one in started:
        one.close()


def talk(path, data):
    """Raw bytes to a socket; everything that comes back."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(5)
        line.connect(str(path))
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        got = b""
        while part := line.recv(65_536):
            got += part
    return [json.loads(answer) for answer in got.splitlines()]


def test_only_its_user_can_open_it(server, place):
    path = server().path
    assert path == place / "demo.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_another_user_is_refused(server):
    (answer,) = talk(server(user=os.getuid() + 1).path, b"")
    assert answer == {"id": None, "ok": False, "error": "another user's run"}


def test_a_directory_of_others_is_refused(place, server):
    place.symlink_to("/tmp")
    with pytest.raises(RunError, match="not a directory of this user"):
        server()


def test_an_open_directory_is_closed(place, server):
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    server()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_lines_are_answered_in_order(server):
    path = server().path
    answers = talk(
        path, b'{"id": 1, "command": "a", "x": [2]}\n{"id": "z", "command": "refuse"}\n{"command": "b"}\n'
    )
    assert answers == [
        {"id": 1, "ok": True, "command": "a", "x": [2]},
        {"id": "z", "ok": False, "error": "no"},
        {"id": None, "ok": True, "command": "b"},
    ]


@pytest.mark.parametrize("line", [b"x", b"[]", b"{}", b'{"command": 3}', b"\xff", b"[" * 20_000, b""])
def test_what_is_no_request_is_refused(server, line):
    (answer,) = talk(server().path, line + b"\n")
    assert answer["ok"] is False
    assert answer["error"].startswith("expected {")


def test_a_line_without_end_is_cut_off(server):
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        talk(server().path, b"x" * (4 * control.LONGEST_LINE))
    assert ask(server("other").path, "alive") == {"command": "alive"}


def test_a_defect_does_not_end_it(server):
    path = server().path
    with pytest.raises(UsageError, match="internal error: ZeroDivisionError"):
        ask(path, "break")
    assert ask(path, "still", there=1) == {"command": "still", "there": 1}


def test_one_run_needs_no_name_several_do(server, place):
    with pytest.raises(UsageError, match="nothing is running"):
        find_run(None, place)
    first = server("a")
    assert find_run(None, place) == first.path
    second = server("b")
    with pytest.raises(UsageError, match=r"which run\? give one with --run NAME; running: a, b"):
        find_run(None, place)
    assert find_run("b", place) == second.path
    with pytest.raises(UsageError, match="no run is called 'c'; running: a, b"):
        find_run("c", place)


def test_names_count_on_unless_they_were_asked_for(server, place):
    assert [server().name, server().name] == ["demo", "demo-2"]
    with pytest.raises(UsageError, match="a run called demo is alive"):
        server(exact=True)
    assert runs(place) == ["demo", "demo-2"]


def test_the_socket_of_a_dead_run_is_replaced(server, place):
    dead = server()
    dead.path.rename(place / "kept")
    dead.close()
    (place / "kept").rename(dead.path)  # as SIGKILL leaves it
    assert runs(place) == []
    assert server().path == dead.path
    assert runs(place) == ["demo"]


def test_the_end_removes_it(server):
    one = server()
    one.close()
    one.close()
    assert not one.path.exists()


def test_a_run_that_goes_away_is_an_error_of_one_line(server):
    hung = threading.Event()
    one = server(handle=lambda command, fields: hung.wait(10) and {})
    control_path = one.path
    one.close()
    with pytest.raises(RunError, match="run demo does not answer"):
        ask(control_path, "say")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-a", ".a", "x" * 65, "a b"])
def test_names_are_no_paths(server, name):
    with pytest.raises(UsageError, match="run name"):
        server(name)


def test_names_from_files():
    assert [name_for(stem) for stem in ("story", "my story!", "Übung", "../", "x" * 90)] == [
        "story", "my-story", "bung", "stream", "x" * 60,
    ]  # fmt: skip


def test_a_path_too_long_for_a_socket(tmp_path):
    with pytest.raises(UsageError, match="107 bytes"):
        ControlServer("x", dict, directory=tmp_path / ("d" * 100))
