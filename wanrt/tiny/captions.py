"""Captions of the toy world in plain English, and the word-level tokenizer of wan-tiny.

A caption may leave attributes out. What is left out has one answer (`scenes.DEFAULT_*`), and a caption
that names no object means a scene without one: a caption then tells the scene but for its jitter.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wanrt.tiny.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    DEFAULT_BACKGROUND,
    DEFAULT_COLOUR,
    DEFAULT_MOTION,
    MOTIONS,
    NO_OBJECT,
    SHAPES,
    Scenes,
)

TEXT_LEN = 32
"""Tokens of a caption, the end mark included."""

SHAPE_WORDS = {
    "ball": ("ball", "ball", "circle", "sphere", "disc", "disk", "orb", "round ball", "beach ball"),
    "square": ("square", "square", "box", "block", "cube", "tile"),
    "triangle": ("triangle", "triangle", "pyramid", "triangular shape", "wedge"),
    "star": ("star", "star", "five-pointed star", "pointed star"),
    "heart": ("heart", "heart", "love heart", "heart shape", "valentine"),
    "ring": ("ring", "ring", "donut", "doughnut", "hoop", "torus"),
    "cross": ("cross", "cross", "plus", "plus sign", "x"),
    "crescent": ("crescent", "crescent", "crescent moon", "moon", "half moon"),
}

COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson", "scarlet", "ruby"),
    "orange": ("orange", "orange", "orange", "tangerine"),
    "yellow": ("yellow", "yellow", "yellow", "golden", "gold", "lemon"),
    "green": ("green", "green", "green", "emerald", "lime"),
    "blue": ("blue", "blue", "blue", "azure", "sapphire", "navy"),
    "purple": ("purple", "purple", "purple", "violet", "lilac"),
    "pink": ("pink", "pink", "pink", "rose", "magenta"),
    "white": ("white", "white", "white", "ivory", "pearl"),
}

MOTION_WORDS = {
    "bouncing": (
        "bouncing",
        "bouncing",
        "that bounces",
        "bounces",
        "jumping",
        "hopping",
        "jumps",
        "bouncing up and down",
        "jumping up and down",
        "bouncing on the ground",
    ),
    "spinning": (
        "spinning",
        "spinning",
        "that spins",
        "spins",
        "rotating",
        "turning",
        "twirling",
        "whirling",
        "rotates",
        "spinning around",
        "turning around itself",
    ),
    "sliding": (
        "sliding",
        "sliding",
        "sliding side to side",
        "sliding from side to side",
        "slides",
        "moving left and right",
        "gliding sideways",
        "going back and forth",
        "moving from left to right",
        "that slides left and right",
    ),
    "circling": (
        "circling",
        "circling",
        "orbiting",
        "orbits",
        "moving in circles",
        "circles around",
        "going around in a circle",
        "revolving",
        "flying in circles",
        "moving in a circle",
    ),
    "pulsing": (
        "pulsing",
        "pulsing",
        "pulsating",
        "throbbing",
        "growing and shrinking",
        "breathing",
        "beating",
        "pulses",
        "that grows and shrinks",
        "swelling",
    ),
    "swinging": (
        "swinging",
        "swinging",
        "swings",
        "swaying like a pendulum",
        "dangling",
        "hanging from a string",
        "swaying",
        "swinging on a string",
        "that swings",
    ),
    "floating": (
        "floating",
        "floating",
        "hovering",
        "floating up and down",
        "levitating",
        "bobbing",
        "hovers",
        "that floats",
        "drifting",
        "gently floating",
    ),
}

SCENE_WORDS = {
    "night": (
        "a night sky",
        "a blue night sky",
        "the night sky",
        "a starry night",
        "a starry sky",
        "a dark sky full of stars",
        "the stars",
        "a dark blue sky at night",
        "the midnight sky",
        "outer space",
    ),
    "sunset": (
        "a sunset",
        "the sunset",
        "an orange sunset",
        "a red sunset",
        "the setting sun",
        "a golden sunset",
        "an evening sky",
        "the sun going down",
        "a pink sunset",
        "a sunset sky",
    ),
    "ocean": (
        "the ocean",
        "the sea",
        "an ocean",
        "a blue sea",
        "the blue ocean",
        "the waves",
        "a bay",
        "the bay",
        "the water",
        "a calm blue ocean",
        "the ocean waves",
    ),
    "meadow": (
        "a meadow",
        "a green meadow",
        "a green field",
        "the grass",
        "grassy hills",
        "green hills",
        "a field of flowers",
        "a flower meadow",
        "a park",
        "a sunny meadow",
    ),
    "desert": (
        "a desert",
        "the desert",
        "sand dunes",
        "yellow dunes",
        "a sandy desert",
        "the sahara",
        "a golden desert",
        "a dry desert with a cactus",
        "the dunes",
        "a desert with green cacti",
    ),
    "mountains": (
        "snowy mountains",
        "the mountains",
        "mountains",
        "snow-capped peaks",
        "the alps",
        "white mountains",
        "a mountain range",
        "white snowy mountains",
        "a snowy mountain",
        "the snow",
    ),
    "city": (
        "a city skyline",
        "a city",
        "the city",
        "skyscrapers",
        "a city at night",
        "downtown",
        "the city lights",
        "tall buildings",
        "a purple city skyline",
        "a skyline at dusk",
    ),
    "forest": (
        "a forest",
        "the forest",
        "the woods",
        "pine trees",
        "a green forest",
        "a dark forest",
        "a pine forest",
        "green trees",
        "a misty forest",
        "the trees",
    ),
    "underwater": (
        "the deep sea",
        "the bottom of the sea",
        "a coral reef",
        "an underwater scene",
        "an aquarium",
        "the blue underwater world",
        "the sea floor",
        "an underwater world",
        "a green underwater scene",
        "a reef",
    ),
    "plain": (
        "a plain background",
        "a plain backdrop",
        "a studio",
        "a grey background",
        "a white background",
        "a blank wall",
        "a white studio",
        "a simple background",
        "a plain grey wall",
        "nothing",
    ),
}

ADVERBS = {
    "night": ("at night", "at midnight", "under the stars", "in space"),
    "sunset": ("at sunset", "in the evening", "at sundown"),
    "ocean": ("at sea", "by the sea", "at the seaside"),
    "meadow": ("in the grass", "on a green field", "in the countryside"),
    "desert": ("in the sand", "on the sand"),
    "mountains": ("in the snow", "in the mountains", "in winter"),
    "city": ("in the city", "downtown", "in town"),
    "forest": ("in the woods", "among the trees", "among green trees"),
    "underwater": ("underwater", "under the sea", "beneath the waves", "under water"),
    "plain": ("in a studio", "on white", "on a plain background"),
}

PREPOSITIONS = ("over", "over", "above", "in front of", "against", "in", "at", "on", "before", "near", "with")
SIZES = ("big", "large", "shiny", "glossy", "bright", "cute", "little", "nice", "huge", "small")
OPENINGS = (
    "a video of",
    "an animation of",
    "a cartoon of",
    "we see",
    "there is",
    "a picture of",
    "a scene with",
)
FILLER = ("slowly", "gently", "happily", "smoothly", "quickly", "softly", "again", "forever")

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Said:
    """Which attributes a caption names."""

    shape: bool = True
    colour: bool = True
    motion: bool = True
    background: bool = True


def _article(phrase: str, rng: random.Random) -> str:
    first = "an" if phrase[0] in "aeiou" else "a"
    return f"{rng.choice((first, first, first, 'the', 'one'))} {phrase}"


def _thing(names: dict[str, str], said: Said, rng: random.Random) -> str:
    word = rng.choice(SHAPE_WORDS[names["shape"]])
    if not said.colour:
        return _article(f"{rng.choice(SIZES)} {word}" if rng.random() < 0.2 else word, rng)
    colour = rng.choice(COLOUR_WORDS[names["colour"]])
    style = rng.random()
    if style < 0.06:
        return f"{_article(word, rng)} that is {colour}"
    if style < 0.10:
        return f"{_article(word, rng)} in {colour}"
    if style < 0.28:
        return _article(f"{rng.choice(SIZES)} {colour} {word}", rng)
    return _article(f"{colour} {word}", rng)


def _place(background: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(ADVERBS[background])
    phrase = rng.choice(SCENE_WORDS[background])
    if rng.random() < 0.12:
        return f"with {phrase} {rng.choice(('behind it', 'in the background', 'behind'))}"
    return f"{rng.choice(PREPOSITIONS)} {phrase}"


def _move(names: dict[str, str], rng: random.Random) -> str:
    words = rng.choice(MOTION_WORDS[names["motion"]])
    if words.startswith("that") or rng.random() > 0.12:
        return words
    return f"{rng.choice(('is ', ''))}{rng.choice(FILLER)} {words}"


def compose(names: dict[str, str], said: Said, rng: random.Random) -> str:
    """One caption of a scene (`Scenes.names`), naming what `said` asks for; lower case, no full stop."""
    if "shape" not in names:
        words = rng.choice(SCENE_WORDS[names["background"]])
        return f"{rng.choice(OPENINGS)} {words}" if rng.random() < 0.3 else words
    parts = [_thing(names, said, rng)]
    if said.motion:
        parts.append(_move(names, rng))
    if said.background:
        style = rng.random()
        if style < 0.12:
            joint = rng.choice((", ", " with ", " and "))
            return rng.choice(SCENE_WORDS[names["background"]]) + joint + " ".join(parts)
        parts.append(_place(names["background"], rng))
    text = " ".join(parts)
    return f"{rng.choice(OPENINGS)} {text}" if rng.random() < 0.12 else text


def sayable(names: dict[str, str], said: Said) -> Said:
    """`said`, with every attribute named that is not the default one, so that the caption stays true."""
    if "shape" not in names:
        return Said()
    return Said(
        shape=True,
        colour=said.colour or names["colour"] != DEFAULT_COLOUR[names["shape"]],
        motion=said.motion or names["motion"] != DEFAULT_MOTION,
        background=said.background or names["background"] != DEFAULT_BACKGROUND,
    )


def caption(names: dict[str, str], rng: random.Random, *, drop: float = 0.5) -> str:
    """One true caption of a scene: default attributes are left out with probability `drop` each."""
    keep = Said(**{k: rng.random() >= drop for k in ("shape", "colour", "motion", "background")})
    return compose(names, sayable(names, keep), rng)


def plain_caption(names: dict[str, str]) -> str:
    """The caption with the most usual words: "a red ball bouncing over a night sky"."""
    places = {"plain": "on a plain background", "underwater": "in an underwater scene"}
    scene = SCENE_WORDS[names["background"]][0]
    if "shape" not in names:
        return scene
    article = "an" if names["colour"][0] in "aeiou" else "a"
    thing = f"{article} {names['colour']} {names['shape']} {names['motion']}"
    return f"{thing} {places.get(names['background'], 'over ' + scene)}"


def _default_scene(rng: random.Random) -> tuple[dict[str, str], Said]:
    """A scene whose caption leaves attributes out: the left-out ones take their defaults."""
    shape = rng.choice(SHAPES)
    said = Said(True, rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5)
    names = {
        "shape": shape,
        "colour": rng.choice(COLOURS) if said.colour else DEFAULT_COLOUR[shape],
        "motion": rng.choice(MOTIONS) if said.motion else DEFAULT_MOTION,
        "background": rng.choice(BACKGROUNDS) if said.background else DEFAULT_BACKGROUND,
    }
    return names, said


def with_defaults(scenes: Scenes, seed: int, share: float = 0.25) -> Scenes:
    """Replace attributes by their defaults in about `share` of the scenes, so that short captions get data.

    Only the attributes change; a change that would make a held-out combination is not made.
    """
    from wanrt.tiny.scenes import held_out

    rng = random.Random(seed)
    columns = {k: getattr(scenes, k).clone() for k in ATTRIBUTES}
    for i in range(len(scenes)):
        if rng.random() >= share or int(scenes.shape[i]) == NO_OBJECT:
            continue
        names, _ = _default_scene(rng)
        new = {k: torch.tensor(v.index(names[k])) for k, v in ATTRIBUTES.items()}
        if not bool(held_out(**new)):
            for k, value in new.items():
                columns[k][i] = value
    return replace(scenes, **columns)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted, after the special marks."""
    texts = [
        *OPENINGS,
        *SIZES,
        *FILLER,
        *PREPOSITIONS,
        "a an the one that is in with behind it background and",
    ]
    for table in (SHAPE_WORDS, COLOUR_WORDS, MOTION_WORDS, SCENE_WORDS, ADVERBS):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    words = {w for text in texts for w in text.replace("-", " - ").split()}
    return [PAD, END, UNKNOWN, *sorted(words | {",", ".", "-"})]


def write_tokenizer(path: Path) -> None:
    """Write wan-tiny's tokenizer.json: lower case, words and punctuation, `</s>` at the end."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = vocabulary()
    ids = {w: i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, ids[END])]
    )
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


def encode(path: Path, texts: list[str], text_len: int = TEXT_LEN) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions to ids and mask, int64 `[N, text_len]` each; longer captions are cut, the end mark kept."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(text_len)
    tokenizer.enable_padding(length=text_len, pad_id=0, pad_token=PAD)
    rows = tokenizer.encode_batch(texts)
    return torch.tensor([r.ids for r in rows]), torch.tensor([r.attention_mask for r in rows])
