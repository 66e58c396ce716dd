from __future__ import annotations

import random

import pytest

from wanrt.panel import layout, words
from wanrt.panel.bars import ASCII, UNICODE
from wanrt.panel.layout import View
from wanrt.panel.snapshot import LoadStep, Phase, Snapshot

NASTY = [
    "",
    "short",
    "红球在蓝色的夜空中弹跳" * 40,
    "\x1b[2J\x1b]0;title\x07 red\r\nball\x00\x9b2J",
    "e\u0301 👩\u200d👩\u200d👧 family " * 30,
    "word " * 2500,
]


@pytest.mark.parametrize("width", [1, 2, 10, 20, 39, 40, 50, 63, 80, 120, 200, 500])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_the_panel_never_leaves_its_room(running, loading, width, glyphs):
    rng = random.Random(width)
    for height in (1, 2, 3, 5, 8, 15, 24, 50):
        prompt, old = rng.choice(NASTY), rng.choice(NASTY)
        for snapshot in (
            running(prompt=prompt, blend_from=old, title=old, warnings=(prompt, old)),
            running(frames_total=None, phase=Phase.FINISHING, prompt=prompt),
            loading,
            Snapshot(),
        ):
            lines = layout.lines(snapshot, View(width, height, glyphs, age=0.3))
            assert len(lines) <= max(1, height - 1)
            for line in lines:
                assert line.cell_len <= max(0, width - 1)
                assert not set(line.plain) & set("\x1b\r\n\x07\x00\x9b")


def test_what_matters_stays_longest(running):
    heights = {h: [line.plain for line in layout.lines(running(), View(80, h))] for h in range(2, 24)}
    assert "165/240" in heights[2][0]
    assert any("fps" in line for line in heights[3])
    assert any(line.startswith(" mesh") for line in heights[7])
    for low in range(2, 23):
        assert len(heights[low]) <= len(heights[low + 1])


def test_a_long_list_of_steps_shows_the_active_one():
    states = ["done"] * 30 + ["active"] + ["waiting"] * 9
    steps = tuple(LoadStep(f"mesh rank {i}", state) for i, state in enumerate(states))
    lines = layout.lines(Snapshot(phase=Phase.LOADING, load=steps), View(80, 10))
    assert any("mesh rank 30" in line.plain for line in lines)


def test_bars_and_clocks_move_with_age(running):
    early, late = ([line.plain for line in layout.lines(running(), View(80, 24, age=a))] for a in (0.0, 1.7))
    assert early[3] != late[3]
    assert "elapsed 0:08" in early[3]
    assert "elapsed 0:10" in late[3]
    assert early[5] != late[5]


def test_late_news_end_the_bars_earlier(running):
    view = View(80, 24)
    late = running(delay_s=0.65)
    bar, axis = (layout.lines(late, view)[i].plain for i in (5, 8))
    assert bar != layout.lines(running(), view)[5].plain
    assert "5.7 s ago" in axis or "5.6 s ago" in axis
    assert "0.7 s ago" in axis or "0.6 s ago" in axis


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.clock_time, None, "-:--"),
        (words.clock_time, 7.4, "0:07"),
        (words.clock_time, 3723, "1:02:03"),
        (words.rate, 9.996, "10.0"),
        (words.rate, 0.456, "0.46"),
        (words.rate, 123.4, "123"),
        (words.size, 921, "921 B"),
        (words.size, 1_910_000, "1.82 MiB"),
        (words.size, 1023 * 1024, "1.00 MiB"),
        (words.milliseconds, 4.21, "4.2 ms"),
        (words.milliseconds, 1250, "1.25 s"),
        (words.seconds, 0.42, "0.42 s"),
        (words.percent, 0.999, "99 %"),
        (words.percent, 1.0, "100 %"),
        (words.one_line, "a\n\tb\x1b[2J c", "a b [2J c"),
    ],
)
def test_words(function, value, text):
    assert function(value) == text


def test_a_part_of_a_size_is_in_the_unit_of_the_whole():
    assert words.of_size(61 * 2**30, 80 * 2**30) == "61.0/80.0 GiB"
    assert words.of_size(61 * 2**30, None) == "61.0 GiB"
