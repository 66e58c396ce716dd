"""How a process leaves the groups it shares with other ranks."""

import threading

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from wanrt.pipeline import remote
from wanrt.pipeline.remote import RankedMesh, Roles, leave_group


class Part:
    """Something with CUDA graphs, that says when it gave them up."""

    def __init__(self, events):
        self.events = events

    def close(self):
        self.events.append("graphs")


class Team:
    def __init__(self, events):
        self.events = events

    def close(self, patience):
        self.events.append(("team", patience))


@pytest.fixture
def events(monkeypatch):
    """What happens to a process group of NCCL, in order."""
    happened = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: dist.Backend.NCCL)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: happened.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: happened.append("aborted"))
    return happened


def mesh_of(events):
    return RankedMesh(
        Team(events), None, None, frozenset(), launch_on_submit=True,
        parts=[Part(events)], cleanup=lambda: events.append("cleaned up"),
    )  # fmt: skip


def test_graphs_go_before_the_communicators_that_they_use(events):
    """NCCL waits for them without end."""
    mesh_of(events).close()
    assert events == [("team", None), "graphs", "destroyed", "cleaned up"]


def test_exchanges_under_way_are_broken_off(events):
    mesh = mesh_of(events)
    mesh._under_way = True
    mesh.close()
    assert events[0] == ("team", remote.IN_PASSING_S)
    assert set(events[1:3]) == {"graphs", "aborted"}  # each may wait for the other
    assert events[3:] == ["cleaned up"]


def test_graphs_may_wait_for_the_break_off(events, monkeypatch):
    broken_off = threading.Event()
    monkeypatch.setattr(c10d, "_abort_process_group", broken_off.set)
    part = Part(events)
    part.close = lambda: events.append(broken_off.wait(5))
    leave_group([part], at_once=True)
    assert events == [True]


def test_a_part_that_fails_keeps_nobody(events, caplog):
    part = Part(events)
    part.close = lambda: 1 / 0
    leave_group([part], at_once=True)
    assert events == ["aborted"]
    assert "while leaving the process group: division by zero" in caplog.text


def test_gloo_has_nothing_to_break_off(events, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: dist.Backend.GLOO)
    leave_group(at_once=True)
    assert events == ["destroyed"]


def test_a_library_that_never_returns_is_left_behind(events, monkeypatch, caplog):
    never = threading.Event()
    monkeypatch.setattr(dist, "destroy_process_group", never.wait)
    monkeypatch.setattr(remote, "LEAVING_S", 0.05)
    leave_group()
    never.set()
    assert "not left within 0.05 s" in caplog.text


def test_no_group_is_no_reason_to_keep_graphs(events, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    leave_group([Part(events)])
    assert events == ["graphs"]


def test_a_ranks_parts_are_those_it_has(events):
    part = Part(events)
    assert Roles(None, part, answers=False).parts == (part,)
    assert Roles(None, None, answers=False).parts == ()
