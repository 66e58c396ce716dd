"""Processes that are started before their task is known."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from wanrt.errors import RunError
from wanrt.parallel.reserve import Reserve
from wanrt.parallel.team import LIBRARY, Loading, Member, Ready, Team


def mark(number, folder):
    Path(folder, f"prepared {number}").touch()


def mark_when_let(number, folder):
    """The second one only when it is let."""
    while number == 2 and not Path(folder, "go").exists():
        time.sleep(0.01)
    mark(number, folder)


def refuse(number):
    raise ValueError(f"number {number} has no device")


def never_done(number):
    time.sleep(600)


def begin(pipe, folder):
    mark("begun", folder)
    pipe.send(Ready())
    pipe.recv()


@pytest.fixture(autouse=True)
def _no_orphans():
    yield
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.fixture
def team():
    heard = []
    team = Team(lambda name, message: heard.append((name, message)))
    team.heard = heard
    yield team
    team.close()


def members(folder, count=1):
    return [Member(f"mesh{i}", "cpu", str(folder)) for i in range(count)]


def test_they_prepare_before_they_have_a_task_and_then_do_it(tmp_path, team):
    with Reserve(partial(mark, folder=tmp_path)) as reserve:
        reserve.fill(2)
        reserve.wait()
        assert {p.name for p in tmp_path.iterdir()} == {"prepared 1", "prepared 2"}
        pids = [process.pid for process, _ in reserve._waiting]
        team.start(members(tmp_path, 3), begin, reserve)
        assert [seat.process.pid for seat in team._seats[:2]] == pids  # the third one is new
        team.wait_ready()
    assert {p.name for p in tmp_path.iterdir()} == {"prepared begun", *(f"prepared {i}" for i in (1, 2, 3))}
    prepared = [name for name, m in team.heard if isinstance(m, Loading) and m.part == LIBRARY]
    assert sorted(prepared) == ["mesh0", "mesh1", "mesh2"]


def test_nobody_begins_before_all_are_there(tmp_path, team):
    with Reserve(partial(mark_when_let, folder=tmp_path)) as reserve:
        team.start(members(tmp_path, 2), begin, reserve)
        looks = []

        def check():
            """Called about five times a second while the team waits."""
            looks.append({p.name for p in tmp_path.iterdir()})
            if len(looks) == 5:
                (tmp_path / "go").touch()

        team.wait_ready(check)
    assert looks[4] <= {"prepared 1"}
    assert (tmp_path / "prepared begun").exists()


def test_a_preparation_that_fails_is_named(tmp_path, team):
    with Reserve(refuse) as reserve:
        reserve.fill(1)
        reserve.wait()
        team.start(members(tmp_path), begin, reserve)
        with pytest.raises(RunError, match=r"mesh0 \(cpu\) failed: number 1 has no device"):
            team.assign()


def test_a_process_that_never_comes_is_named(tmp_path, team, monkeypatch):
    monkeypatch.setattr("wanrt.parallel.team.START_S", 0.5)
    with Reserve(never_done) as reserve:
        team.start(members(tmp_path), begin, reserve)
        with pytest.raises(RunError, match=r"not started within 0.5 s: mesh0 \(cpu\)"):
            team.assign()


def test_those_not_taken_end_with_the_reserve():
    with Reserve(never_done) as reserve:
        reserve.fill(2)
        processes = [process for process, _ in reserve._waiting]
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)


def test_a_team_that_ends_early_does_not_wait_for_preparations(tmp_path, caplog):
    team = Team()
    team.start(members(tmp_path), begin, Reserve(never_done))
    process = team._seats[0].process
    team.close()
    assert not process.is_alive()
    assert "did not end by itself" not in caplog.text


RANKS_FIRST = """
import sys
from wanrt.parallel.reserve import Reserve

if __name__ == "__main__":
    fill = Reserve.fill

    def noted(self, count):
        print(count, "torch" in sys.modules)
        fill(self, count)

    Reserve.fill = noted
    from wanrt.pipeline.bench import run_bench
    from wanrt.pipeline.build import Tuning
    from wanrt.pipeline.matrix import Entry

    flags = {"size": "32x32", "random_weights": True, "device": "cpu"}
    run_bench(flags, [Entry("tp=2")], 2, 1, Tuning(), None)
"""


def test_ranks_are_on_their_way_before_this_process_imports_torch(tmp_path):
    (tmp_path / "ranks_first.py").write_text(RANKS_FIRST)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ranks_first.py")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["1", "False"]), done.stderr
