"""What a clip of the toy world shows, as numbers: attributes, jitter, the seed, the held-out split."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SHAPES = ("ball", "square", "triangle", "star", "heart", "ring", "cross", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
MOTIONS = ("bouncing", "spinning", "sliding", "circling", "pulsing", "swinging", "floating")
BACKGROUNDS = (
    "night",
    "sunset",
    "ocean",
    "meadow",
    "desert",
    "mountains",
    "city",
    "forest",
    "underwater",
    "plain",
)
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "background": BACKGROUNDS}

NO_OBJECT = -1
"""`Scenes.shape` of a scene without an object: only the background is seen."""

DEFAULT_COLOUR = {
    "ball": "red",
    "square": "blue",
    "triangle": "green",
    "star": "yellow",
    "heart": "pink",
    "ring": "orange",
    "cross": "purple",
    "crescent": "white",
}
"""The colour of a shape whose caption names none: one answer per caption keeps four steps enough."""

DEFAULT_MOTION = "floating"
DEFAULT_BACKGROUND = "plain"

JITTERS = 8
"""Random numbers per scene, each uniform in -1..1 (see `world.place`)."""

HELD_OUT_MODULUS = 11


@dataclass(frozen=True)
class Scenes:
    """A batch of N scenes: integer attributes `[N]` (int64) and `jitter` `[N, JITTERS]` in -1..1."""

    shape: Tensor
    colour: Tensor
    motion: Tensor
    background: Tensor
    jitter: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def names(self, i: int) -> dict[str, str]:
        """The attributes of scene `i` in words; shape, colour and motion are absent without an object."""
        out = {"background": BACKGROUNDS[int(self.background[i])]}
        if int(self.shape[i]) != NO_OBJECT:
            out["shape"] = SHAPES[int(self.shape[i])]
            out["colour"] = COLOURS[int(self.colour[i])]
            out["motion"] = MOTIONS[int(self.motion[i])]
        return out


def cat(parts: list[Scenes]) -> Scenes:
    """Join batches of scenes."""
    return Scenes(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)))


def held_out(shape: Tensor, colour: Tensor, motion: Tensor, background: Tensor) -> Tensor:
    """True where a combination is kept out of training for ever: one in eleven.

    A Latin rule: every pair of attributes is still seen in training, only the whole combination is new.
    Arguments are int64 tensors of one shape; the result is bool of that shape. Scenes without an object
    are never held out.
    """
    return ((shape + 3 * colour + 5 * motion + 7 * background) % HELD_OUT_MODULUS == 0) & (shape >= 0)


def _draw(count: int, empty: float, g: torch.Generator) -> Scenes:
    def pick(n: int) -> Tensor:
        return torch.randint(n, (count,), generator=g)

    shape, colour, motion, background = (pick(len(v)) for v in ATTRIBUTES.values())
    bare = torch.rand(count, generator=g) < empty
    jitter = torch.rand(count, JITTERS, generator=g) * 2 - 1
    return Scenes(torch.where(bare, NO_OBJECT, shape), colour, motion, background, jitter)


def sample_scenes(
    seed: int, count: int, *, split: str = "train", empty: float = 0.06, jitter: float = 1.0
) -> Scenes:
    """Draw `count` scenes, a function of the arguments alone.

    `split` is "train" (never a held-out combination) or "held-out" (only those, always with an object).
    `empty` is the share of scenes without an object, `jitter` scales the random offsets (0: canonical).
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"split is {split!r}; use 'train' or 'held-out'")
    g = torch.Generator().manual_seed(seed)
    parts: list[Scenes] = []
    while sum(map(len, parts)) < count:
        drawn = _draw(2 * count + 64, empty if split == "train" else 0.0, g)
        test = held_out(drawn.shape, drawn.colour, drawn.motion, drawn.background)
        parts.append(drawn[(test if split == "held-out" else ~test).nonzero()[:, 0]])
    scenes = cat(parts)[slice(0, count)]
    return Scenes(scenes.shape, scenes.colour, scenes.motion, scenes.background, scenes.jitter * jitter)


def scene(*, shape: str | None, colour: str = "red", motion: str = "floating", background: str) -> Scenes:
    """One canonical scene (no jitter) from names; `shape` None shows the background alone."""
    index = NO_OBJECT if shape is None else SHAPES.index(shape)
    values = (index, COLOURS.index(colour), MOTIONS.index(motion), BACKGROUNDS.index(background))
    columns = dict(zip(ATTRIBUTES, (torch.tensor([v]) for v in values), strict=True))
    return Scenes(**columns, jitter=torch.zeros(1, JITTERS))
