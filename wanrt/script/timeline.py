"""From times to chunks: which frames a chunk shows, and what every chunk is conditioned on.

    chunk        0        1         2         3
    frames    0 .. 8   9 .. 20   21 .. 32   33 .. 44      (9 frames, then 12 each)

Rounding, in one place:
  * a duration becomes `round(seconds x fps)` frames, halves up, and the video has exactly that many;
  * a scene starts with the chunk whose first frame is nearest to the scene's first frame, the earlier one
    when two are equally near: at most 6 frames off;
  * a transition is a ramp in frames that begins with its scene's first chunk; a chunk takes the ramp's value
    in the chunk's middle. A transition shorter than half a chunk is a cut.

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

FIRST_CHUNK_FRAMES = 9  # the first latent is one pixel frame, the other two are four each
CHUNK_FRAMES = 12

Blend = tuple[tuple[str, float], ...]  # prompts with their weights, which sum to 1


class Curve(StrEnum):
    """How two prompts' embeddings blend: in a straight line, or along the arc between their directions."""

    LERP = "lerp"
    SLERP = "slerp"


@dataclass(frozen=True)
class Scene:
    """A stretch of the video with one prompt or weighted blend of prompts.

    `ramp` is the length of the transition into it, in pixel frames (0: a cut). `bias` and `steps`
    override the job's when they are not None.
    """

    prompts: Blend
    start_frame: int
    start_chunk: int
    ramp: Fraction = Fraction(0)
    curve: Curve = Curve.LERP
    bias: float | None = None
    steps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Conditioning:
    """What one chunk is conditioned on.

    The embedding is `prompts` when `blend_from` is None; else it lies `blend_fraction` (0..1, exclusive) of
    the way from `blend_from` to `prompts`, along `curve`. `bias`, `steps`: the scene's own, or None for the
    job's. `seed`: another one than the job's, from this chunk on.
    """

    prompts: Blend
    blend_from: Blend | None = None
    blend_fraction: float = 1.0
    curve: Curve = Curve.LERP
    scene: int = 0
    bias: float | None = None
    steps: tuple[float, ...] | None = None
    seed: int | None = None

    @property
    def text(self) -> str:
        """The prompt as one line for people: the heaviest one of a blend."""
        return max(self.prompts, key=lambda pair: pair[1])[0]


@dataclass(frozen=True)
class Timeline:
    """Scenes in the order of their first chunks; the last one goes on for ever."""

    scenes: tuple[Scene, ...]

    def __post_init__(self) -> None:
        starts = [scene.start_chunk for scene in self.scenes]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"scenes start at chunks {starts}; expected 0 and then rising")

    @classmethod
    def of(cls, prompt: str) -> Timeline:
        """One prompt for ever."""
        return cls((Scene(((prompt, 1.0),), 0, 0),))

    def at(self, chunk: int) -> Conditioning:
        """What chunk `chunk` (from 0) is conditioned on."""
        if chunk < 0:
            raise ValueError(f"chunk {chunk}; expected 0 or more")
        index = bisect.bisect_right(self.scenes, chunk, key=lambda scene: scene.start_chunk) - 1
        scene = self.scenes[index]
        fraction = self._fraction(scene, chunk)
        before = self.scenes[index - 1].prompts if index and fraction < 1 else None
        return Conditioning(
            prompts=scene.prompts,
            blend_from=before,
            blend_fraction=float(fraction) if before is not None else 1.0,
            curve=scene.curve,
            scene=index,
            bias=scene.bias,
            steps=scene.steps,
        )

    def prompts(self) -> tuple[str, ...]:
        """Every prompt once, in the order of its first use: what the text encoder has to read."""
        return tuple(dict.fromkeys(text for scene in self.scenes for text, _ in scene.prompts))

    @staticmethod
    def _fraction(scene: Scene, chunk: int) -> Fraction:
        """The ramp's value in the middle of `chunk`, at most 1."""
        if scene.ramp <= 0:
            return Fraction(1)
        middle = first_frame(chunk) - first_frame(scene.start_chunk) + Fraction(chunk_frames(chunk), 2)
        return min(Fraction(1), middle / scene.ramp)


def chunk_frames(chunk: int) -> int:
    """Pixel frames that chunk `chunk` makes."""
    return CHUNK_FRAMES if chunk else FIRST_CHUNK_FRAMES


def first_frame(chunk: int) -> int:
    """Index of the first pixel frame of chunk `chunk`: as many as the chunks before it make."""
    return FIRST_CHUNK_FRAMES + CHUNK_FRAMES * (chunk - 1) if chunk > 0 else 0


def chunks_for(frames: int) -> int:
    """The fewest chunks that make at least `frames` pixel frames."""
    return 1 + max(0, -(-(frames - FIRST_CHUNK_FRAMES) // CHUNK_FRAMES)) if frames > 0 else 0


def nearest_chunk(frame: int) -> int:
    """The chunk whose first frame is nearest to `frame`; the earlier one when two are equally near."""
    after = chunks_for(frame)  # the first chunk that starts at `frame` or later
    if after == 0:
        return 0
    return after if first_frame(after) - frame < frame - first_frame(after - 1) else after - 1


def to_frames(seconds: Fraction, fps: Fraction) -> int:
    """`seconds` in frames, halves up; exact."""
    return int((seconds * fps * 2 + 1) // 2)
