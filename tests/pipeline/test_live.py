import threading
from fractions import Fraction

import pytest
import torch

from wanrt.errors import UsageError
from wanrt.pipeline.build import biases_on
from wanrt.pipeline.live import REMEMBERED, LiveTimeline, mixture
from wanrt.script import Conditioning, Curve, Scene, Timeline

BALL, STAR, SEA = ((("ball", 1.0),), (("star", 1.0),), (("sea", 1.0),))
FILE = Timeline((Scene(BALL, 0, 0), Scene(STAR, 45, 4, bias=0.5)))


def test_untouched_it_is_the_file():
    live = LiveTimeline(FILE)
    assert [live.at(c) for c in range(8)] == [FILE.at(c) for c in range(8)]
    assert live.scenes == FILE.scenes


def test_a_prompt_holds_from_the_next_chunk_on_and_for_good():
    live = LiveTimeline(FILE)
    for chunk in range(2):
        live.at(chunk)
    assert live.say(SEA) == 2
    assert live.at(1).prompts == BALL  # settled
    assert [live.at(c).prompts for c in range(2, 9)] == [SEA] * 7
    assert live.at(2).scene == 2
    assert live.at(2).text == "sea"


def test_a_ramp_takes_its_value_in_the_chunks_middle_like_a_files():
    live = LiveTimeline(Timeline.of("ball"))
    live.at(0)
    assert live.say(SEA, Fraction(30), Curve.SLERP) == 1
    same = Timeline((Scene(BALL, 0, 0), Scene(SEA, 9, 1, Fraction(30), Curve.SLERP)))
    assert [live.at(c) for c in range(1, 6)] == [same.at(c) for c in range(1, 6)]


def test_a_prompt_in_a_transition_starts_from_the_mixture():
    live = LiveTimeline(Timeline.of("ball"))
    live.at(0)
    live.say(STAR, Fraction(48))
    assert live.at(1).blend_fraction == pytest.approx(6 / 48)
    live.say(SEA, Fraction(24))
    now = live.at(2)
    assert now.prompts == SEA
    assert dict(now.blend_from) == pytest.approx({"ball": 1 - 18 / 48, "star": 18 / 48})
    assert live.at(4).blend_from is None


def test_mixture_of_blends():
    now = Conditioning((("a", 0.5), ("b", 0.5)), (("b", 1.0),), 0.25)
    assert dict(mixture(now)) == pytest.approx({"a": 0.125, "b": 0.875})
    assert mixture(Conditioning(BALL)) == BALL


def test_settings_win_over_scenes():
    live = LiveTimeline(FILE)
    live.at(0)
    assert live.set(bias=0.2, steps=(1000.0, 500.0)) == 1
    assert live.at(0).bias is None
    assert (live.at(5).bias, live.at(5).steps) == (0.2, (1000.0, 500.0))
    live.set(bias=1.0)
    assert (live.at(6).bias, live.at(6).steps) == (1.0, (1000.0, 500.0))


def test_another_file_can_be_followed():
    live = LiveTimeline(FILE)
    live.at(0)
    live.say(SEA)
    live.at(1)
    assert live.follow(Timeline.of("moon")) == 2
    assert live.at(2).text == "moon"
    assert live.at(1).text == "sea"


NONSENSE = [
    lambda live: live.say(()),
    lambda live: live.say(((" ", 1.0),)),
    lambda live: live.set(bias=0.0),
    lambda live: live.set(bias=2.0),
    lambda live: live.set(steps=(500.0, 700.0)),
]


@pytest.mark.parametrize("change", NONSENSE)
def test_nonsense_is_refused_and_changes_nothing(change):
    live = LiveTimeline(FILE)
    with pytest.raises(UsageError):
        change(live)
    assert live.at(0) == FILE.at(0)


def test_memory_is_bounded_and_threads_agree():
    live = LiveTimeline(Timeline.of("ball"))
    done = threading.Event()

    def talk():
        while not done.is_set():
            live.say(STAR, Fraction(24))
            live.set(bias=0.5)

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        for chunk in range(1000):
            assert live.at(chunk) == live.at(chunk)
    finally:
        done.set()
        talker.join()
    assert len(live._answers) <= REMEMBERED


def test_a_pipeline_follows_what_is_said(fake_pipeline, fakes):
    live = LiveTimeline(Timeline.of("a"))
    pipeline, _, denoiser = fake_pipeline(timeline=live, frames=None)
    frames = pipeline.run()
    first = [next(frames).pixels for _ in range(2)]
    said = live.say((("b", 1.0),))
    after = [next(frames).pixels for _ in range(3)]
    plain = fake_pipeline(timeline=LiveTimeline(Timeline.of("a")), frames=57)[0]
    unsaid = [f.pixels for f in plain.run()]
    assert said == 3  # chunk 2 was asked for while chunk 1 was shown: a chunk later at the latest
    assert all(torch.equal(a, b) for a, b in zip([*first, after[0]], unsaid[:3], strict=True))
    assert not torch.equal(after[1], unsaid[3])
    assert denoiser.log.count("text") == 2


def test_graphs_are_captured_for_both_biases():
    class Job:
        timeline, bias = LiveTimeline(Timeline.of("a")), 1.0

    assert biases_on(Job()) == {True, False}
