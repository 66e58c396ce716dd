"""Who can share memory with whom, and that all ranks learn when one of them cannot."""

from __future__ import annotations

import pytest
import torch

from wanrt.parallel.peers import CudaPeers, PeerError, open_peers, why_apart
from wanrt_kernels.nvrtc import NvrtcError

HERE = "one start of one machine"


def everybody(a, b):
    return True


@pytest.mark.parametrize(
    ("ranks", "reaches", "reason"),
    [
        ([(HERE, 0, None), (HERE, 1, None)], everybody, None),
        ([(HERE, 0, None), (HERE, 0, None)], lambda a, b: False, None),  # one device shares with itself
        ([(HERE, 0, None), (HERE, 1, "switched off")], everybody, "switched off"),
        ([(HERE, 0, None), ("another", 0, None)], everybody, "the ranks are on several machines"),
        (
            [(HERE, 0, None), (HERE, 1, None), (HERE, 2, None)],
            lambda a, b: (a, b) != (2, 1),
            "cuda:2 does not reach the memory of cuda:1",
        ),
    ],
)
def test_what_keeps_ranks_apart(ranks, reaches, reason):
    assert why_apart(ranks, reaches) == reason


def test_nobody_shares_a_cpus_memory():
    assert open_peers(None, torch.device("cpu")) is None


def agree(group, failing):
    peers = CudaPeers.__new__(CudaPeers)  # no CUDA device here; only the group is looked at
    peers.rank, peers.size, peers._group = group.rank(), group.size(), group

    def call():
        if group.rank() == failing:
            raise NvrtcError("CUDA driver: out of memory (2)")
        return group.rank() * 10

    try:
        return peers._agree(call)
    except PeerError as error:
        return str(error)


def test_all_ranks_learn_what_one_could_not(on_ranks):
    assert on_ranks(2, agree, None) == [[0, 10], [0, 10]]


def test_an_error_is_everybodys(on_ranks):
    assert on_ranks(2, agree, 1) == ["rank 1 of the mesh: CUDA driver: out of memory (2)"] * 2


@pytest.mark.parametrize(
    ("variable", "reason"),
    [("WANRT_PEERS", "switched off by WANRT_PEERS=0"), ("NCCL_P2P_DISABLE", "NCCL_P2P_DISABLE is set")],
)
def test_switches(monkeypatch, variable, reason):
    from wanrt.parallel import peers

    monkeypatch.delenv("WANRT_PEERS", raising=False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert peers._switched_off() in (None, "Triton is not installed")
    monkeypatch.setenv(variable, "0" if variable == "WANRT_PEERS" else "1")
    assert peers._switched_off() == reason
