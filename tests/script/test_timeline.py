"""The timeline against a naive oracle that lists every frame."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanrt.script.timeline import (
    Curve,
    Scene,
    Timeline,
    chunk_frames,
    chunks_for,
    first_frame,
    nearest_chunk,
    to_frames,
)

# frame -> chunk, written out: nine frames of chunk 0, twelve of each later one
FRAMES = [0] * 9 + [1 + i // 12 for i in range(12 * 400)]


@given(st.integers(0, 400))
def test_frames_of_a_chunk(chunk):
    assert first_frame(chunk) == FRAMES.index(chunk)
    assert chunk_frames(chunk) == FRAMES.count(chunk)


@given(st.integers(1, 4000))
def test_chunks_for(frames):
    assert chunks_for(frames) == FRAMES[frames - 1] + 1


def test_no_frames_no_chunks():
    assert chunks_for(0) == 0


@given(st.integers(0, 4000))
def test_nearest_chunk(frame):
    starts = [FRAMES.index(c) for c in range(FRAMES[frame] + 2)]
    distances = [abs(frame - start) for start in starts]
    assert nearest_chunk(frame) == distances.index(min(distances))


@given(st.fractions(0, 1000), st.fractions(1, 240))
def test_rounding_halves_up(seconds, fps):
    frames = to_frames(seconds, fps)
    assert frames - Fraction(1, 2) <= seconds * fps < frames + Fraction(1, 2)


def scenes():
    """Random scenes with rising first chunks."""
    gaps = st.lists(st.tuples(st.integers(1, 9), st.fractions(0, 60), st.sampled_from(Curve)), max_size=8)

    def build(gaps):
        made, chunk = [Scene((("p0", 1.0),), 0, 0)], 0
        for i, (gap, ramp, curve) in enumerate(gaps, 1):
            chunk += gap
            made.append(Scene(((f"p{i}", 1.0),), first_frame(chunk), chunk, ramp, curve))
        return tuple(made)

    return gaps.map(build)


@given(scenes(), st.integers(0, 80))
def test_conditioning_against_a_walk_over_frames(scenes, chunk):
    """Walk all frames up to the chunk; the ramp at the chunk's middle is the mean of its frames' centres."""
    current = 0
    for frame in range(first_frame(chunk) + 1):
        for i, scene in enumerate(scenes):
            if frame == scene.start_frame:
                current = i
    scene = scenes[current]
    centres = [f + Fraction(1, 2) - scene.start_frame for f, c in enumerate(FRAMES[:1200]) if c == chunk]
    middle = sum(centres) / len(centres)
    got = Timeline(scenes).at(chunk)
    assert got.prompts == scene.prompts
    assert got.scene == current
    if current == 0 or scene.ramp <= middle:
        assert (got.blend_from, got.blend_fraction) == (None, 1.0)
    else:
        assert got.blend_from == scenes[current - 1].prompts
        assert got.blend_fraction == pytest.approx(float(middle / scene.ramp), abs=1e-12)
        assert got.curve == scene.curve


@given(scenes(), st.integers(0, 80))
def test_pure(scenes, chunk):
    timeline = Timeline(scenes)
    assert timeline.at(chunk) == Timeline(scenes).at(chunk) == timeline.at(chunk)


@given(scenes())
def test_fractions_rise_within_a_scene(scenes):
    last = {}
    for chunk in range(90):
        at = Timeline(scenes).at(chunk)
        assert 0 < at.blend_fraction <= 1
        assert at.blend_fraction >= last.get(at.scene, 0)
        last[at.scene] = at.blend_fraction


def test_prompts_in_order_and_once():
    a, b = (("x", 0.5), ("y", 0.5)), (("y", 1.0),)
    assert Timeline((Scene(a, 0, 0), Scene(b, 9, 1))).prompts() == ("x", "y")
    assert Timeline.of("x").prompts() == ("x",)


def test_wrong_scenes_and_chunks():
    with pytest.raises(ValueError, match="expected 0 and then rising"):
        Timeline(())
    with pytest.raises(ValueError, match="expected 0 and then rising"):
        Timeline((Scene((("x", 1.0),), 9, 1),))
    with pytest.raises(ValueError, match="expected 0 or more"):
        Timeline.of("x").at(-1)
