"""Training clips as latents in device memory: encoded once per VAE, drawn from at every step.

A clip has six chunks (69 frames, 18 latents). The world repeats after four chunks, so chunks 2 to 5 show
every phase with an anchor in the context, and chunk n >= 2 of an endless video has the truth of chunk
2 + (n - 2) % 4 here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from wanrt.models.vae import WanVae
from wanrt.tiny import captions, training
from wanrt.tiny.scenes import ATTRIBUTES, Scenes, cat, sample_scenes
from wanrt.tiny.world import World

CHUNKS = 6
LATENTS = 3 * CHUNKS
FRAMES = 1 + 4 * (LATENTS - 1)
CAPTIONS = 6
"""Captions of every scene, one of which is drawn at every use."""

NO_CUT = 99


@dataclass(frozen=True)
class Corpus:
    """Clips on one device.

    Attributes:
        latents: `[N, 18, 16, h, w]` fp16, normalised.
        anchors: `[N, 6, 16, h, w]` fp16: the anchor in the context of chunk n (from 2).
        masks: `[N, 18, h, w]` fp16, 0..1, where the object is.
        tokens: `[N, 2, CAPTIONS, text_len]` int32, of the scene before and after the cut.
        labels: `[N, 2, 4]` int64: shape (8 without an object), colour, motion, background.
        cut: `[N]` int64, the first chunk of the second scene, or NO_CUT.
    """

    latents: Tensor
    anchors: Tensor
    masks: Tensor
    tokens: Tensor
    labels: Tensor
    cut: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def context(self, clip: Tensor, chunk: Tensor) -> Tensor:
        """True context `[B, 16, 3, h, w]` of chunks `chunk` >= 1, float32."""
        first = torch.where(
            (chunk == 1)[:, None, None, None], self.latents[clip, 0], self.anchors[clip, chunk.clamp(min=2)]
        )
        frames = [first, self.latents[clip, 3 * chunk - 2], self.latents[clip, 3 * chunk - 1]]
        return torch.stack(frames, dim=2).float()

    def target(self, clip: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Chunk latents `[B, 16, 3, h, w]` and masks `[B, 1, 3, h, w]`, float32."""
        index = 3 * chunk[:, None] + torch.arange(3, device=chunk.device)
        latents = self.latents[clip[:, None], index].transpose(1, 2)
        return latents.float(), self.masks[clip[:, None], index][:, None].float()

    def text(self, clip: Tensor, chunk: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids `[B, text_len]` and labels `[B, 4]` of the scene shown in each chunk; `pick` chooses."""
        scene = (chunk >= self.cut[clip]).long()
        return self.tokens[clip, scene, pick].long(), self.labels[clip, scene]


def labels_of(scenes: Scenes) -> Tensor:
    """`[N, 4]` int64: shape, colour, motion, background; no object counts as one more shape."""
    columns = [getattr(scenes, k) for k in ATTRIBUTES]
    columns[0] = torch.where(columns[0] < 0, len(ATTRIBUTES["shape"]), columns[0])
    return torch.stack(columns, dim=1)


def _texts(scenes: Scenes, seed: int) -> list[str]:
    rng = random.Random(seed)
    out = []
    for i in range(len(scenes)):
        names = scenes.names(i)
        out.append(captions.plain_caption(names))
        out += [_noisy(captions.caption(names, rng), rng) for _ in range(CAPTIONS - 1)]
    return out


def _noisy(text: str, rng: random.Random) -> str:
    """Now and then a word the tokenizer does not know, so that it does no harm later."""
    if rng.random() > 0.15:
        return text
    words = text.split()
    words.insert(rng.randrange(len(words) + 1), "zzz")
    return " ".join(words)


@dataclass(frozen=True)
class ClipPlan:
    """Scenes of a shard before rendering: the first, the one after the cut, and where the cut is."""

    first: Scenes
    second: Scenes
    cut: Tensor


def plan_clips(seed: int, count: int, cut_share: float = 0.2) -> ClipPlan:
    """`count` clips, sorted so that clips of one cut lie together (they are rendered together)."""
    first = captions.with_defaults(sample_scenes(seed, count), seed + 1)
    second = captions.with_defaults(sample_scenes(seed + 2, count), seed + 3)
    g = training.generator("cpu", seed, 4)
    cut = torch.randint(1, CHUNKS, (count,), generator=g)
    cut = torch.where(torch.rand(count, generator=g) < cut_share, cut, NO_CUT).sort().values
    return ClipPlan(first, second, cut)


def cut_frame(chunk: int) -> int:
    """First pixel frame of a chunk: 0, 9, 21, ..."""
    return max(0, 12 * chunk - 3)


@torch.no_grad()
def _encode(vae: WanVae, world: World, plan: ClipPlan, rows: slice, half: bool) -> tuple[Tensor, ...]:
    cut = int(plan.cut[rows.start])
    times = torch.arange(FRAMES)
    pixels, mask = world.render(plan.first[rows], times)
    if cut != NO_CUT:
        at = cut_frame(cut)
        late, late_mask = world.render(plan.second[rows], times[at:])
        pixels[:, :, at:], mask[:, :, at:] = late, late_mask
    with torch.autocast(pixels.device.type, torch.float16, enabled=half):
        latents = vae.encode_train(pixels)[0]
        alone = pixels[:, :, torch.arange(CHUNKS).sub(1).clamp(min=0) * 12]
        frames = alone.transpose(1, 2).flatten(0, 1)[:, :, None]
        anchors = vae.encode_train(frames)[0][:, :, 0].unflatten(0, (-1, CHUNKS))
    return latents.transpose(1, 2).half(), anchors.half(), _latent_mask(mask).half()


def _latent_mask(mask: Tensor) -> Tensor:
    """The object's mask `[B, 1, T, H, W]` per latent `[B, n, h, w]`: most of its four frames, area-averaged
    over 8x8 pixels, grown a little.
    """
    small = F.avg_pool3d(mask, (1, 8, 8))
    later = small[:, :, 1:].unflatten(2, (-1, 4)).amax(3)
    joined = torch.cat([small[:, :, :1], later], dim=2)
    return F.max_pool3d(joined, (1, 3, 3), stride=1, padding=(0, 1, 1))[:, 0]


def encode_corpus(
    vae: WanVae, world: World, tokenizer: Path, *, seed: int, count: int, batch: int = 8, half: bool = True
) -> Corpus:
    """Draw, render and encode `count` clips on the VAE's device."""
    plan = plan_clips(seed, count)
    parts = [_encode(vae, world, plan, rows, half) for rows in _same_cut(plan.cut, batch)]
    latents, anchors, masks = (torch.cat([p[i] for p in parts]) for i in range(3))
    device = latents.device
    ids, _ = captions.encode(tokenizer, _texts(cat([plan.first, plan.second]), seed + 5))
    tokens = ids.view(2, count, CAPTIONS, -1).transpose(0, 1).to(device, torch.int32)
    labels = torch.stack([labels_of(plan.first), labels_of(plan.second)], 1).to(device)
    return Corpus(latents, anchors, masks, tokens.contiguous(), labels, plan.cut.to(device))


def _same_cut(cut: Tensor, batch: int) -> list[slice]:
    out, start = [], 0
    for i in range(1, len(cut) + 1):
        if i == len(cut) or i - start == batch or cut[i] != cut[start]:
            out.append(slice(start, i))
            start = i
    return out
