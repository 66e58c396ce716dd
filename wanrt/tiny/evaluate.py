"""What wan-tiny's videos show, measured by the judge on held-out prompts."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanrt.models.text_encoder import UMT5Encoder
from wanrt.models.transformer import WanTransformer
from wanrt.models.vae import WanVae
from wanrt.tiny import captions, training
from wanrt.tiny.corpus import labels_of
from wanrt.tiny.judge import WINDOW, Judge, accuracy, view
from wanrt.tiny.pictures import contact_sheet, save_gif, save_picture
from wanrt.tiny.rollout import STEPS, Roller
from wanrt.tiny.scenes import ATTRIBUTES, sample_scenes

logger = logging.getLogger("wanrt.tiny")

SECOND = 16
"""Frames."""


@dataclass(frozen=True)
class Models:
    """The embedded model and its tokenizer file, on one device."""

    transformer: WanTransformer
    text: UMT5Encoder
    vae: WanVae
    tokenizer: Path

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.patch_embedding.weight.device

    @torch.no_grad()
    def features(self, prompts: list[str]) -> Tensor:
        """Text features `[B, text_len, D]`, zero after the end mark."""
        ids, mask = captions.encode(self.tokenizer, prompts)
        ids, mask = ids.to(self.device), mask.to(self.device)
        return self.text(ids, mask).masked_fill(mask[..., None] == 0, 0.0)


def held_out_prompts(count: int, seed: int = 500) -> tuple[list[str], Tensor]:
    """Captions and labels `[count, 4]` of held-out combinations, every second one in the plainest words."""
    scenes = sample_scenes(seed, count, split="held-out")
    rng = random.Random(seed)
    texts = [
        captions.compose(scenes.names(i), captions.Said(), rng)
        if i % 2
        else captions.plain_caption(scenes.names(i))
        for i in range(count)
    ]
    return texts, labels_of(scenes)


@dataclass(frozen=True)
class Shot:
    """How videos are made for a measurement."""

    chunks: int
    steps: tuple[float, ...] = STEPS
    anchor: str = "anchor-only"
    half: bool = True
    size: tuple[int, int] = (128, 224)


@torch.no_grad()
def film(
    models: Models, prompts: list[list[str]], shot: Shot, seed: int, keep: set[int]
) -> dict[int, Tensor]:
    """Videos of B prompts; `prompts[k]` holds the B prompts of chunk k (the last entry goes on).

    Returns the pixels `[B, 3, T, H, W]` (float16) of the chunks in `keep`, by chunk.
    """
    roller = Roller(models.transformer, models.vae, steps=shot.steps, anchor=shot.anchor, half=shot.half)
    size = (shot.size[0] // 8, shot.size[1] // 8)
    streams = roller.start(len(prompts[0]), size)
    g = training.generator(models.device, seed)
    kept: dict[int, Tensor] = {}
    text = None
    for chunk in range(shot.chunks):
        if chunk < len(prompts):
            text = roller.embed(models.features(prompts[chunk]))
        assert text is not None
        pixels = roller.advance(streams, text, g, size)
        if chunk in keep:
            kept[chunk] = pixels.half()
    return kept


def windows(kept: dict[int, Tensor], first: int, last: int) -> Tensor:
    """The first 48 frames of chunks `first`..`last`."""
    return torch.cat([kept[c] for c in range(first, last + 1)], dim=2)[:, :, :WINDOW].float()


@torch.no_grad()
def judged(judge: Judge, clips: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy per attribute of 48-frame clips."""
    parts = [judge(view(c)) for c in clips.split(32)]
    logits = {k: torch.cat([p[k] for p in parts]) for k in ATTRIBUTES}
    return accuracy(logits, labels.to(clips.device))


def _mean(rows: list[dict[str, float]], weights: list[int]) -> dict[str, float]:
    total = sum(weights)
    pairs = list(zip(rows, weights, strict=True))
    return {k: round(sum(r[k] * w for r, w in pairs) / total, 4) for k in ATTRIBUTES}


def judged_chunks(chunks: int) -> tuple[list[int], list[int]]:
    """First chunks of the windows to judge, from the video's start and from its end: 1 to 3 of four chunks each.

    Three windows are 9 of the first 10 seconds, chunk 0 left out, and the last 9. Raises `ValueError` for a video too
    short for one at each end.
    """
    count = min(3, (chunks - 1) // 8)
    if count < 1:
        raise ValueError(f"{chunks} chunks: expected at least 9, four to judge at each end")
    return [1 + 4 * i for i in range(count)], [chunks - 4 * (count - i) for i in range(count)]


def measure(models: Models, judge: Judge, *, prompts: int, shot: Shot, batch: int = 50) -> dict[str, Any]:
    """Accuracies early and late in videos from held-out prompts, over the windows of `judged_chunks`."""
    texts, labels = held_out_prompts(prompts)
    ends = dict(zip(("early", "late"), judged_chunks(shot.chunks), strict=True))
    keep = {first + i for starts in ends.values() for first in starts for i in range(4)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ends}
    sizes: list[int] = []
    for i in range(0, prompts, batch):
        part = texts[i : i + batch]
        kept = film(models, [part], shot, 1000 + i, keep)
        for name, starts in ends.items():
            shown = [
                judged(judge, windows(kept, first, first + 3), labels[i : i + batch]) for first in starts
            ]
            found[name].append(_mean(shown, [1] * len(shown)))
        sizes.append(len(part))
    return {
        **{name: _mean(rows, sizes) for name, rows in found.items()},
        "chunks": shot.chunks,
        "windows": len(ends["early"]),
        "prompts": prompts,
    }


def measure_change(models: Models, judge: Judge, *, prompts: int, shot: Shot) -> dict[str, Any]:
    """Accuracies of the new prompt's attributes from two chunks after a prompt change at chunk 5 on."""
    texts, _ = held_out_prompts(prompts, seed=600)
    after, labels = held_out_prompts(prompts, seed=601)
    plan = [texts] * 5 + [after]
    kept = film(models, plan, Shot(11, shot.steps, shot.anchor, shot.half), 2000, {7, 8, 9, 10})
    return {"after_two_chunks": judged(judge, windows(kept, 7, 10), labels), "prompts": prompts}


SHOWN = (
    "a red ball bouncing over a blue night sky",
    "a green star spinning",
    "a sunset",
    "a pink heart pulsing over snowy mountains",
    "a yellow crescent swinging over the ocean",
    "a blue square sliding side to side in a desert",
    "a white ring circling over a city skyline",
    "a purple triangle floating underwater",
    "an orange cross spinning in a forest",
    "a golden star orbiting over a meadow",
)
"""Prompts of the pictures."""


MOVING = (0, 1, 3, 4, 5, 6)
"""Prompts of the GIF."""


def pictures(models: Models, out: Path, *, half: bool, seed: int = 7) -> None:
    """A contact sheet (one row per prompt of `SHOWN`) and a GIF that loops over one period of the world."""
    kept = film(models, [list(SHOWN)], Shot(5, half=half), seed, set(range(5)))
    clips = torch.cat([kept[c] for c in range(5)], dim=2).float().cpu()
    out.mkdir(parents=True, exist_ok=True)
    save_picture(contact_sheet(clips, list(range(0, 48, 8))), out / "wan-tiny.png", limited=True)
    save_gif(clips[list(MOVING), :, 9:57:2], out / "wan-tiny.gif", columns=3, fps=8)
