from __future__ import annotations

import random

import pytest

from wanrt.panel import bars
from wanrt.panel.bars import ASCII, UNICODE, Cell


def naive(blocks, window, width, samples=200):
    """Busy eighths of every cell by sampling."""
    found = []
    for cell in range(width):
        times = [-window + (cell + (i + 0.5) / samples) * window / width for i in range(samples)]
        found.append(sum(any(a <= t < b for a, b in blocks) for t in times) / samples * 8)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_cell_holds_as_much_ink_as_time_was_busy(seed):
    rng = random.Random(seed)
    window, width = rng.choice([1.0, 5.0, 8.0]), rng.randrange(10, 90)
    cuts = sorted(rng.uniform(-1.5 * window, 0) for _ in range(2 * rng.randrange(1, 20)))
    blocks = list(zip(cuts[::2], cuts[1::2], strict=True))
    cells = bars.coverage(blocks, window, width)
    assert len(cells) == width
    for cell, want in zip(cells, naive(blocks, window, width), strict=True):
        assert abs(cell.eighths - want) <= (1.0 if want < 0.5 else 0.55)


def test_ink_lies_where_the_work_was():
    cells = bars.coverage([(-4.0, -3.75), (-2.25, -2.0), (-1.0, 0.0)], 4.0, 4)
    assert cells == [Cell(2, right=False), Cell(2, right=True), Cell(0), Cell(8)]


def test_right_hand_ink_is_the_reversed_complement():
    cells = [Cell(8), Cell(3), Cell(0), Cell(3, right=True)]
    assert bars.runs(cells, UNICODE) == [("busy", "█▍"), ("idle", "─"), ("reversed", "▋")]
    assert bars.runs(cells, ASCII) == [("busy", "#"), ("idle", "---")]


def test_a_sliver_stays_visible():
    assert bars.coverage([(-0.5, -0.496)], 1.0, 10)[5].eighths == 1


def test_progress_moves_in_half_characters():
    assert bars.progress(0.25, 6, UNICODE) == ("━╸", "━━━━")
    assert bars.progress(0, 4, ASCII) == ("", "----")
    assert bars.progress(1, 4, UNICODE) == ("━━━━", "")


def test_the_window_is_a_round_number_of_seconds():
    assert [bars.nice_window(p) for p in (None, 0.1, 0.52, 0.9, 4, 1000)] == [10, 1, 5, 8, 30, 600]
