"""Rank processes that work, fail, die and hang."""

import logging
import os
import signal
import time

import psutil
import pytest

from wanrt.errors import RunError
from wanrt.parallel.team import Loading, Member, Ready, Spans, Team


def echo(pipe, assignment):
    logging.getLogger("wanrt.test").info("hello from %s", assignment)
    pipe.send(Loading("weights", None))
    pipe.send(Ready("two weights"))
    while (command := pipe.recv()) is not None:
        pipe.send(Spans([assignment, command]))


def fails_at_once(pipe, assignment):
    logging.getLogger("wanrt.test").warning("about to fail")
    raise ValueError("no such weights:\n model.pt")


def killed_on_command(pipe, assignment):
    pipe.send(Ready())
    pipe.recv()
    if assignment == "a":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    raise RuntimeError("Connection closed by peer")  # what gloo says in the surviving ranks


def deaf(pipe, assignment):
    pipe.send(Ready())
    time.sleep(600)


@pytest.fixture
def start():
    teams = []

    def start(entry, *names):
        heard = []
        team = Team(lambda name, message: heard.append((name, message)))
        team.start([Member(name, f"cpu {i}", name) for i, name in enumerate(names)], entry)
        teams.append(team)
        team.assign()
        return team, heard

    yield start
    for team in teams:
        team.close()
    assert not [p for p in psutil.Process().children(recursive=True) if p.name().startswith("wanrt")]


def until(condition, team, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        team.check()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_commands_and_answers(start, caplog):
    caplog.set_level(logging.INFO, "wanrt")
    team, heard = start(echo, "mesh0", "mesh1")
    team.wait_ready()
    assert [m for _, m in heard] == [Loading("weights", None)] * 2
    team.send(7)
    until(lambda: len(heard) == 4, team)
    assert {(name, tuple(m.batch)) for name, m in heard[2:]} == {
        ("mesh0", ("mesh0", 7)),
        ("mesh1", ("mesh1", 7)),
    }
    team.close()
    assert "mesh0 (cpu 0) is ready: two weights" in caplog.text
    assert "mesh1: hello from mesh1" in caplog.text


def test_a_rank_that_fails_is_named_with_its_words_and_log(start):
    team, _ = start(fails_at_once, "mesh0")
    with pytest.raises(
        RunError, match=r"mesh0 \(cpu 0\) failed: no such weights: model.pt; last lines: about to fail"
    ):
        team.wait_ready()


def test_the_first_cause_is_named_not_its_consequences(start):
    team, _ = start(killed_on_command, "b", "a")
    team.wait_ready()
    team.send("go")
    with pytest.raises(RunError, match=r"a \(cpu 1\) failed: killed by signal 9"):
        until(lambda: False, team)


def test_a_rank_without_an_answer_is_named(start):
    team, _ = start(deaf, "mesh0")
    team.wait_ready()
    assert "without an answer: mesh0 (cpu 0)" in str(team.failure("mesh: nothing for 30 s"))


def test_a_deaf_rank_is_killed_at_the_end(start, monkeypatch):
    monkeypatch.setattr("wanrt.parallel.team.GOODBYE_S", 0.3)
    team, _ = start(deaf, "mesh0")
    team.wait_ready()
    began = time.monotonic()
    team.close()
    team.close()
    assert time.monotonic() - began < 5


def test_a_check_may_end_the_wait(start):
    team, _ = start(echo, "mesh0")

    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        team.wait_ready(check)


def test_ranks_die_with_their_parent(tmp_path):
    import subprocess
    import sys

    code = (
        "import time\n"
        "from wanrt.parallel.team import Member, Team\n"
        "if __name__ == '__main__':\n"
        "    from ranks import wait_for_ever\n"
        "    team = Team(); team.start([Member('child', 'cpu', 0)], wait_for_ever); team.wait_ready()\n"
        "    print(team._seats[0].process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "ranks.py").write_text(
        "import time\nfrom wanrt.parallel.team import Ready\n\n\n"
        "def wait_for_ever(pipe, assignment):\n    pipe.send(Ready())\n    time.sleep(600)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}"}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=env
    )
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=10) if child.is_running() else None
    assert not child.is_running()
