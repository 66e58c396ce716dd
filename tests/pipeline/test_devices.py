"""What a process takes of its machine."""

import pytest
import torch

from wanrt.pipeline import devices
from wanrt.pipeline.devices import set_threads


@pytest.fixture
def cores(monkeypatch):
    """A machine of twelve cores, whose threads nobody has set."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "usable_cores", lambda: 12)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "processes", "threads"),
    [("cpu", 1, 12), ("cpu", 4, 3), ("cpu", 13, 1), ("cuda", 1, 5), ("cuda", 4, 3)],
)
def test_processes_share_the_cores(cores, device, processes, threads):
    assert set_threads(torch.device(device), processes) == threads == torch.get_num_threads()


def test_omp_num_threads_has_the_last_word(cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert set_threads(torch.device("cpu"), 4) == 5
