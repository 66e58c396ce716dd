"""Live memory against sums done by hand."""

import torch

from wanrt.probes.live_memory import LiveMemory

FLOATS = 1000
BYTES = 4 * FLOATS


def test_counts_what_is_made_and_forgets_what_is_gone():
    before = torch.ones(FLOATS)
    with LiveMemory(before) as memory:
        one = before + 1
        two = one * 2
        assert memory.live == memory.peak == 2 * BYTES
        del one
        assert (memory.live, memory.peak) == (BYTES, 2 * BYTES)
        view = two[: FLOATS // 2].view(-1, 2)
        two.add_(before)
        del two
        assert memory.live == BYTES, "a view keeps the whole storage"
        del view
        assert memory.live == 0
        assert memory.restart() == 2 * BYTES
        assert memory.peak == 0


def test_what_existed_before_is_not_counted():
    before = torch.ones(FLOATS)
    with LiveMemory() as memory:
        before.mul_(2)
        kept = before.view(-1, 2)
    assert kept.shape == (FLOATS // 2, 2)
    assert memory.peak == 0


def test_a_storage_remembered_beyond_the_run_counts_until_it_goes():
    with LiveMemory() as memory:
        kept = torch.zeros(FLOATS)
    assert memory.live == BYTES
    del kept
    assert memory.live == 0
