"""The judge: names shape, colour, motion and background of a clip; trained on rendered truth only."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanrt.tiny import training
from wanrt.tiny.corpus import labels_of
from wanrt.tiny.scenes import ATTRIBUTES, sample_scenes
from wanrt.tiny.training import Budget, Clock, Ranks
from wanrt.tiny.world import PERIOD, World

logger = logging.getLogger("wanrt.tiny")

WINDOW = PERIOD
"""Frames that the judge looks at."""

STRIDE = 3
"""It sees every third of them."""

SIZE = (64, 112)
"""At this many rows and columns."""


class Judge(nn.Module):
    """A small 3-D CNN with one head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        plan = (
            (3, 32, (1, 3, 3), (1, 2, 2)),
            (32, 64, (3, 3, 3), (1, 2, 2)),
            (64, 96, (3, 3, 3), (2, 2, 2)),
            (96, 128, (3, 3, 3), (2, 1, 1)),
        )
        layers: list[nn.Module] = []
        for a, b, kernel, stride in plan:
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            layers += [nn.Conv3d(a, b, kernel, stride, padding), nn.GroupNorm(8, b), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.squeeze = nn.Conv3d(128, 16, 1)
        self.mix = nn.Linear(16 * 4 * 4 * 7 + 2 * 128, 256)
        self.heads = nn.ModuleDict({k: nn.Linear(256, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """`[B, 3, 16, 64, 112]` in -1..1 to logits per attribute."""
        x = self.body(clip)
        flat = F.avg_pool3d(self.squeeze(x), (1, 2, 2)).flatten(1)
        x = torch.cat([flat, x.mean((2, 3, 4)), x.amax((2, 3, 4))], dim=1)
        x = F.gelu(self.mix(x))
        return {k: head(x) for k, head in self.heads.items()}


def view(pixels: Tensor) -> Tensor:
    """48 frames `[B, 3, 48, H, W]` as the judge sees them, `[B, 3, 16, 64, 112]`."""
    return F.adaptive_avg_pool3d(pixels[:, :, ::STRIDE], (WINDOW // STRIDE, *SIZE))


def truth(world: World, seed: int, count: int, split: str) -> tuple[Tensor, Tensor]:
    """Views and labels `[B, 4]` of true clips that start anywhere in the period."""
    g = training.generator("cpu", seed, 9)
    start = int(torch.randint(PERIOD, (1,), generator=g))
    scenes = sample_scenes(seed, count, split=split, empty=0.0)
    pixels, _ = world.render(scenes, torch.arange(start, start + WINDOW, STRIDE))
    return F.adaptive_avg_pool3d(pixels, (WINDOW // STRIDE, *SIZE)), labels_of(scenes).to(pixels.device)


def roughen(clip: Tensor, g: torch.Generator) -> Tensor:
    """Blur, noise and small colour changes, so that a codec's softness does not unsettle the judge."""
    b = len(clip)
    r = torch.rand(b, 5, generator=g, device=clip.device)
    soft = F.avg_pool3d(clip, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    clip = torch.lerp(clip, soft, r[:, 0, None, None, None, None])
    noise = torch.randn(clip.shape, generator=g, device=clip.device)
    clip = clip + 0.12 * r[:, 1, None, None, None, None] * noise
    gain = 0.92 + 0.16 * r[:, 2:5, None, None, None]
    return (clip * gain).clamp(-1, 1)


def accuracy(logits: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """Share of right answers per attribute."""
    return {k: float((v.argmax(1) == labels[:, i]).float().mean()) for i, (k, v) in enumerate(logits.items())}


def train_judge(budget: Budget, *, seed: int = 3, batch: int = 48, lr: float = 1e-3) -> tuple[Judge, World]:
    """Train on one device until the budget is spent."""
    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(seed)
    world, judge = World(128, 224, ranks.device), Judge().to(ranks.device)
    run = training.make_run(list(judge.named_parameters()), optimizer="adamw", lr=lr, average=0.995)
    clock, begun = Clock(budget, ranks), time.monotonic()
    while (progress := clock.at(run.step)) < 1:
        clip, labels = truth(world, training.mixed_seed(seed, run.step) % 2**31, batch, "train")
        clip = roughen(clip, training.generator(ranks.device, seed, run.step, 1))
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
            logits = judge(clip)
        loss = sum(F.cross_entropy(v.float(), labels[:, i]) for i, v in enumerate(logits.values()))
        assert isinstance(loss, Tensor)
        loss.backward()
        run.update(ranks, budget.rate(run.step, progress), clip=5.0)
        if run.step % 100 == 0:
            seconds = time.monotonic() - begun
            logger.info("judge step %d (%.0f s): loss %.3f", run.step, seconds, float(loss.detach()))
    run.average.swap(run.params)
    return judge.eval(), world


@torch.no_grad()
def validate(judge: Judge, world: World, count: int = 480) -> dict[str, float]:
    """Accuracy on held-out truth."""
    seen: list[dict[str, float]] = []
    for i in range(0, count, 48):
        clip, labels = truth(world, 80_000 + i, 48, "held-out")
        seen.append(accuracy(judge(clip), labels))
    return {k: sum(s[k] for s in seen) / len(seen) for k in ATTRIBUTES}


def save_judge(judge: Judge, path: Path) -> None:
    """Write fp16 weights."""
    from safetensors.torch import save_file

    save_file({k: v.half().contiguous().cpu() for k, v in judge.state_dict().items()}, path)


def load_judge(path: Path, device: torch.device | str = "cpu") -> Judge:
    """Read `save_judge`'s file; fp32, eval mode."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.to(device).eval().requires_grad_(False)
