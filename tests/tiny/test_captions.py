from __future__ import annotations

import random

import pytest
import torch

from wanrt.models.tokenizer import PromptTokenizer
from wanrt.tiny import captions
from wanrt.tiny.captions import (
    COLOUR_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    TEXT_LEN,
    Said,
    caption,
    encode,
    plain_caption,
    sayable,
    vocabulary,
    with_defaults,
)
from wanrt.tiny.scenes import (
    ATTRIBUTES,
    DEFAULT_BACKGROUND,
    DEFAULT_COLOUR,
    DEFAULT_MOTION,
    held_out,
    sample_scenes,
)


def said_words(text):
    return f" {text.replace(',', ' ').replace('-', ' ')} "


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(21, 300)


def test_captions_name_what_is_not_a_default(scenes):
    rng = random.Random(1)
    for i in range(len(scenes)):
        names = scenes.names(i)
        if "shape" not in names:
            continue
        text = said_words(caption(names, rng))

        def says(phrases, text=text):
            return any(f" {p.replace('-', ' ')} " in text for p in phrases)

        assert says(SHAPE_WORDS[names["shape"]]), text
        if names["colour"] != DEFAULT_COLOUR[names["shape"]]:
            assert says(COLOUR_WORDS[names["colour"]]), text
        if names["motion"] != DEFAULT_MOTION:
            assert says(MOTION_WORDS[names["motion"]]), text
        if names["background"] != DEFAULT_BACKGROUND:
            assert says(captions.SCENE_WORDS[names["background"]] + captions.ADVERBS[names["background"]]), (
                text
            )


def test_only_defaults_may_be_left_out():
    nothing = Said(False, False, False, False)
    plain = {"shape": "ball", "colour": "red", "motion": "floating", "background": "plain"}
    assert sayable(plain, nothing) == Said(True, False, False, False)
    special = {"shape": "ball", "colour": "blue", "motion": "spinning", "background": "city"}
    assert sayable(special, nothing) == Said()


def test_captions_vary_and_repeat_with_their_seed(scenes):
    names = next(scenes.names(i) for i in range(20) if "shape" in scenes.names(i))
    texts = [caption(names, random.Random(s)) for s in range(40)]
    assert len(set(texts)) > 25
    assert texts == [caption(names, random.Random(s)) for s in range(40)]


def test_plain_captions_are_unique():
    names = [
        {"shape": s, "colour": c, "motion": m, "background": b}
        for s in ATTRIBUTES["shape"]
        for c in ATTRIBUTES["colour"]
        for m in ATTRIBUTES["motion"]
        for b in ATTRIBUTES["background"]
    ]
    assert len({plain_caption(n) for n in names}) == len(names)


def test_synonyms_of_one_attribute_are_not_shared():
    for table in (SHAPE_WORDS, COLOUR_WORDS, MOTION_WORDS, captions.SCENE_WORDS):
        phrases = [p for words in table.values() for p in set(words)]
        assert len(phrases) == len(set(phrases))


def test_defaults_never_make_a_held_out_scene(scenes):
    changed = with_defaults(scenes, 4, share=1.0)
    assert not held_out(changed.shape, changed.colour, changed.motion, changed.background).any()
    assert torch.equal(changed.jitter, scenes.jitter)


def test_every_caption_is_known_to_the_tokenizer(scenes, assets):
    rng = random.Random(2)
    texts = [caption(scenes.names(i), rng) for i in range(len(scenes))]
    ids, mask = encode(assets / "tokenizer.json", texts)
    assert ids.shape == (len(texts), TEXT_LEN)
    assert (ids != vocabulary().index(captions.UNKNOWN)).all()
    assert ((ids == vocabulary().index(captions.END)).sum(1) == 1).all()
    assert torch.equal(mask, (ids != 0).long())


def test_the_shipped_tokenizer_is_what_the_code_writes(assets, tmp_path):
    captions.write_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == (assets / "tokenizer.json").read_text()


def test_training_and_inference_tokenize_alike(assets):
    texts = ["A Red ball, bouncing over a blue night-sky!", "a sunset", "a frobnicating star"]
    ids, mask, truncated = PromptTokenizer.from_file(assets / "tokenizer.json", TEXT_LEN)(texts)
    ours, our_mask = encode(assets / "tokenizer.json", texts)
    assert torch.equal(ids, ours)
    assert torch.equal(mask, our_mask)
    assert truncated == [False] * 3


def test_long_captions_are_cut_and_keep_their_end(assets):
    ids, mask = encode(assets / "tokenizer.json", ["red ball " * 40])
    assert mask.all()
    assert ids[0, -1] == vocabulary().index(captions.END)
