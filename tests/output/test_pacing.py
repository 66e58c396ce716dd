"""Constant rate out of bursts: deadlines, and what viewers see, against simple simulations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanrt.output.pacing import Metronome, Pace, Pacer, blend


def level(value):
    return np.full((3, 2), value, np.uint8)


def play(pacer, bursts, ticks, fps):
    """Feed bursts {tick: frames} and take `ticks` frames; returns (level shown, repeated) per tick from the first."""
    shown, number = [], 0
    for tick in range(ticks):
        count = bursts.get(tick, 0)
        if count:
            pacer.put([level(number + index) for index in range(count)], tick / fps)
            number += count
        if (frame := pacer.take()) is not None:
            shown.append((int(frame.planes[0, 0]), frame.repeated))
    return shown


def test_deadlines_do_not_drift():
    metronome = Metronome(24000 / 1001, 5.0)
    for tick in range(10_000):
        assert metronome.due == pytest.approx(5.0 + tick * 1001 / 24000, abs=1e-9)
        metronome.tick(metronome.due + 0.03 * (tick % 3))
    assert metronome.stalls == 0


def test_a_little_lateness_is_caught_up_a_stall_is_not():
    metronome = Metronome(10, 0.0)
    metronome.tick(0.3)
    assert metronome.due == pytest.approx(0.1)
    metronome.tick(7.0)
    assert (metronome.stalls, metronome.due) == (1, pytest.approx(7.1))


def test_fast_enough_is_shown_as_it_is():
    for pace in Pace:
        shown = play(Pacer(pace, 16), dict.fromkeys(range(0, 96, 12), 12), 96, 16)
        assert shown == [(tick, False) for tick in range(96)]


def test_repeat_holds_the_last_frame():
    shown = play(Pacer(Pace.REPEAT, 16), {0: 3, 5: 3}, 10, 16)
    assert [value for value, _ in shown] == [0, 1, 2, 2, 2, 3, 4, 5, 5, 5]
    assert [repeated for _, repeated in shown] == [
        False,
        False,
        False,
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.25])
def test_slow_shows_every_frame_and_spreads_the_repeats(rate):
    period = round(12 / rate)
    bursts = dict.fromkeys(range(0, 20 * period, period), 12)
    shown = play(Pacer(Pace.SLOW, 16), bursts, 20 * period, 16)[4 * period :]
    values = [value for value, _ in shown]
    assert set(np.diff(values)) <= {0, 1}, "none skipped"
    longest = max(len(run) for run in "".join("r" if repeated else "n" for _, repeated in shown).split("n"))
    assert longest <= 2 / rate, "no freeze from burst to burst"
    assert (values[-1] - values[0]) / len(values) == pytest.approx(rate, rel=0.1)


def test_blend_moves_evenly():
    bursts = dict.fromkeys(range(0, 480, 24), 12)
    pacer, shown = Pacer(Pace.BLEND, 16), []
    number = 0
    for tick in range(480):
        if count := bursts.get(tick, 0):
            pacer.put([level((number + index) % 64 * 4) for index in range(count)], tick / 16)
            number += count
        shown.append(pacer.take())
    steps = np.diff([int(frame.planes[0, 0]) for frame in shown[120:]])
    forward = steps[steps >= 0]  # the test's levels wrap around
    assert forward.max() <= 4
    assert forward.mean() == pytest.approx(2, rel=0.15), "half of 4 levels a frame, at half the rate"
    assert not any(frame.repeated for frame in shown[120:])


def test_blend_is_a_weighted_mean():
    first, second = (np.random.default_rng(n).integers(0, 256, (6, 4), dtype=np.uint8) for n in (1, 2))
    for weight in (0, 0.25, 0.5, 1):
        want = first * (1 - weight) + second * weight
        assert np.abs(blend(first, second, weight) - want).max() <= 0.5


@settings(max_examples=60, deadline=None)
@given(
    pace=st.sampled_from(list(Pace)),
    bursts=st.dictionaries(st.integers(0, 59), st.integers(1, 12), min_size=1, max_size=12),
)
def test_never_backwards_and_never_lost(pace, bursts):
    pacer = Pacer(pace, 16)
    values = [value for value, _ in play(pacer, bursts, 3000, 16)]
    assert (np.diff(values) >= 0).all()
    assert values[-1] == sum(bursts.values()) - 1
    assert pacer.waiting == 0
    if pace is not Pace.BLEND:
        assert sorted(set(values)) == list(range(sum(bursts.values())))
