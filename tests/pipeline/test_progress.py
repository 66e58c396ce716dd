"""How a start is told."""

import pytest

from wanrt.pipeline.progress import timed


def test_a_part_is_told_once_a_percent():
    heard = []
    with timed(lambda *about: heard.append(about), "transformer") as done:
        for count in range(1, 1001):
            done(count, 1000)
    (*begun,), *under_way, (part, seconds) = heard
    assert begun == ["transformer", None]
    assert under_way == [("transformer", None, percent / 100) for percent in range(1, 101)]
    assert part == "transformer"
    assert seconds > 0


def test_a_part_that_fails_is_not_done():
    heard = []
    with pytest.raises(ValueError, match="no"), timed(lambda *about: heard.append(about), "VAE"):
        raise ValueError("no")
    assert heard == [("VAE", None)]
