"""Training of wan-tiny's VAE on the toy world, and its measurement.

Loss: L1 + 0.5 x L1 of the spatial and temporal gradients + 4 x squared error, each pixel weighted by 1 + 4
inside the object's surroundings, + 2e-4 KL. Whole crops of 17 frames first, whole frames towards the end.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanrt.models.vae import VaeConfig, WanVae
from wanrt.tiny import training
from wanrt.tiny.pictures import contact_sheet, save_picture
from wanrt.tiny.scenes import cat, sample_scenes
from wanrt.tiny.training import Budget, Clock, Ranks
from wanrt.tiny.vae_start import near_identity_
from wanrt.tiny.world import PERIOD, World

logger = logging.getLogger("wanrt.tiny")

VAE_CONFIG = VaeConfig(base_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
"""wan-tiny's VAE before its latents are measured."""


@dataclass(frozen=True)
class VaeRecipe:
    """How the VAE is trained. Sizes in pixels and pixel frames; `batch` clips per rank."""

    seed: int = 1
    budget: Budget = field(default_factory=lambda: Budget(minutes=5.0))
    crop: int = 96
    frames: int = 17
    batch: int = 16
    whole_from: float = 0.7
    whole_frames: int = 17
    whole_batch: int = 6
    lr: float = 1e-3
    optimizer: str = "adamw"
    object_weight: float = 4.0
    kl: float = 2e-4
    compiled: bool = False
    half: bool = True
    height: int = 128
    width: int = 224


class Codec(nn.Module):
    """Encode, sample, decode: what a training step runs, in one module so that it can be compiled."""

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels and noise of the latent's shape to reconstruction, mean, log-variance."""
        mean, logvar = self.vae.encode_train(pixels)
        sample = mean + noise * (0.5 * logvar).exp()
        return self.vae.decode_train(sample), mean, logvar


def _differences(x: Tensor, axis: int) -> Tensor:
    return x.diff(dim=axis)


def reconstruction_loss(out: Tensor, pixels: Tensor, mask: Tensor, object_weight: float) -> Tensor:
    """The weighted loss of a clip `[B, 3, T, H, W]` under the object's mask `[B, 1, T, H, W]`."""
    near = F.max_pool3d(mask, (1, 9, 9), stride=1, padding=(0, 4, 4))
    weight = 1 + object_weight * near
    error = out.float() - pixels
    total = (weight * (error.abs() + 4 * error.square())).mean() / weight.mean()
    for axis in (2, 3, 4):
        edge = _differences(error, axis).abs()
        w = weight.narrow(axis, 1, weight.shape[axis] - 1)
        total = total + 0.5 * (w * edge).mean() / w.mean()
    return total


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean per latent number of KL(N(mean, exp(logvar)) || N(0, 1)), in nats."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def training_clips(world: World, seed: int, count: int, frames: int, split: str) -> tuple[Tensor, Tensor]:
    """Clips that begin anywhere in the period, one in eight with a cut; pixels and mask on the device."""
    g = training.generator("cpu", seed, 7)
    scenes = sample_scenes(seed, count, split=split, empty=0.04)
    start = int(torch.randint(PERIOD, (1,), generator=g))
    times = torch.arange(start, start + frames)
    pixels, mask = world.render(scenes, times)
    cuts = count // 8
    if cuts:
        at = int(torch.randint(1, frames, (1,), generator=g))
        after = sample_scenes(seed + 1, cuts, split=split)
        late, late_mask = world.render(after, times[at:])
        pixels[:cuts, :, at:], mask[:cuts, :, at:] = late, late_mask
    return pixels, mask


def random_crops(pixels: Tensor, mask: Tensor, size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """One square crop per clip, three in four around the object where it is in some frame."""
    n, _, t, h, w = pixels.shape
    draws = torch.rand(n, 4, generator=g)
    frame = (draws[:, 3] * t).long()
    seen = mask[torch.arange(n, device=mask.device), 0, frame.to(mask.device)]
    weight = seen.flatten(1).double().sum(1).clamp(min=1e-6)
    centre_y = ((seen.sum(2) * torch.arange(h, device=mask.device)).sum(1) / weight).cpu()
    centre_x = ((seen.sum(1) * torch.arange(w, device=mask.device)).sum(1) / weight).cpu()
    around = (draws[:, 2] < 0.75) & (weight.cpu() > 1)
    y = torch.where(around, centre_y - size * (0.2 + 0.6 * draws[:, 0]), draws[:, 0] * (h - size))
    x = torch.where(around, centre_x - size * (0.2 + 0.6 * draws[:, 1]), draws[:, 1] * (w - size))
    top, left = y.clamp(0, h - size).long().tolist(), x.clamp(0, w - size).long().tolist()

    def cut(clip: Tensor) -> Tensor:
        return torch.stack(
            [
                clip[i, :, :, y : y + size, x : x + size]
                for i, (y, x) in enumerate(zip(top, left, strict=True))
            ]
        )

    return cut(pixels), cut(mask)


class VaeTrainer:
    """The loop; `run` is what a checkpoint holds."""

    def __init__(self, recipe: VaeRecipe, ranks: Ranks) -> None:
        self.recipe, self.ranks = recipe, ranks
        torch.manual_seed(recipe.seed)
        self.world = World(recipe.height, recipe.width, ranks.device)
        vae = WanVae(VAE_CONFIG)
        near_identity_(vae, self._clips_for_start())
        self.vae = vae.to(ranks.device)
        self.codec = Codec(self.vae)
        self.run = training.make_run(
            list(self.vae.named_parameters()),
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            matrix=lambda name, p: p.ndim > 1 and p.shape[0] > 3 and "conv1.weight" not in name,
            average=0.998,
        )
        self.forward = torch.compile(self._forward, dynamic=False) if recipe.compiled else self._forward

    def _clips_for_start(self) -> Tensor:
        pixels, _ = training_clips(self.world, self.recipe.seed, 4, 5, "train")
        return pixels.cpu()

    def _forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.recipe.half:
            return self.codec(pixels, noise)
        # bf16 copies of the fp32 weights: activations and norms in bf16 halve the traffic, the bound here.
        weights = {f"vae.{n}": p.to(torch.bfloat16) for n, p in self.vae.named_parameters()}
        return torch.func.functional_call(self.codec, weights, (pixels.bfloat16(), noise.bfloat16()))

    def batch(self, step: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, mask and latent noise of one step on this rank."""
        r = self.recipe
        numbers = (r.seed, step, self.ranks.rank)
        seed = training.mixed_seed(*numbers) % 2**31
        count, frames = (r.whole_batch, r.whole_frames) if whole else (r.batch, r.frames)
        pixels, mask = training_clips(self.world, seed, count, frames, "train")
        if not whole:
            pixels, mask = random_crops(pixels, mask, r.crop, training.generator("cpu", *numbers, 1))
        shape = (count, 16, 1 + (frames - 1) // 4, pixels.shape[3] // 8, pixels.shape[4] // 8)
        g = training.generator(self.ranks.device, *numbers, 2)
        noise = torch.randn(shape, generator=g, device=self.ranks.device)
        return pixels, mask, noise

    def step(self, progress: float) -> dict[str, Tensor]:
        """One update; returns 0-dim losses on the device."""
        r = self.recipe
        whole = progress >= r.whole_from
        pixels, mask, noise = self.batch(self.run.step, whole)
        # Whole frames are another shape: compiling for it would cost more than it gives.
        out, mean, logvar = (self._forward if whole else self.forward)(pixels, noise)
        loss = reconstruction_loss(out, pixels, mask, r.object_weight)
        kl = kl_divergence(mean, logvar)
        (loss + r.kl * kl).backward()
        norm = self.run.update(self.ranks, r.budget.rate(self.run.step, progress), clip=1.0)
        return {"loss": loss.detach(), "kl": kl.detach(), "norm": norm}

    def train(self, out: Path, save_every: float = 60.0) -> None:
        """Run through the budget; checkpoints go to `out`/vae.pt."""
        clock = Clock(self.recipe.budget, self.ranks, self.run.progress)
        begun = last = time.monotonic()
        while (progress := clock.at(self.run.step)) < 1.0:
            self.run.progress = progress
            losses = self.step(progress)
            if self.run.step % 50 == 0 and self.ranks.leads:
                self._report(losses, progress, begun)
            if self.ranks.leads and time.monotonic() - last > save_every:
                training.save(self.run.state(), out / "vae.pt")
                last = time.monotonic()
        self.run.progress = clock.progress
        if self.ranks.leads:
            training.save(self.run.state(), out / "vae.pt")

    def _report(self, losses: dict[str, Tensor], progress: float, begun: float) -> None:
        values = " ".join(f"{k} {float(v):.4f}" for k, v in losses.items())
        logger.info(
            "vae step %d (%.0f %%, %.0f s): %s",
            self.run.step,
            100 * progress,
            time.monotonic() - begun,
            values,
        )

    def averaged(self) -> WanVae:
        """The VAE with averaged weights, fp32, in eval mode, its latents not yet measured."""
        vae = WanVae(VAE_CONFIG)
        vae.load_state_dict(dict(zip(self.run.names, self.run.average.shadow, strict=True)))
        return vae.to(self.ranks.device).eval()


@torch.no_grad()
def reconstruct(vae: WanVae, pixels: Tensor) -> Tensor:
    """Encode and decode whole clips, clamped, in batches of eight."""
    return torch.cat([vae.decode_train(vae.encode_train(p)[0]).clamp(-1, 1).float() for p in pixels.split(8)])


def boxes(mask: Tensor) -> Tensor:
    """The bounding box of the object in every frame as a 0/1 mask, `[B, 1, T, H, W]` to the same."""
    rows, columns = (mask > 0.5).any(4, keepdim=True), (mask > 0.5).any(3, keepdim=True)

    def span(seen: Tensor, axis: int) -> Tensor:
        s = seen.float()
        return (s.cumsum(axis) > 0) & (s.flip(axis).cumsum(axis).flip(axis) > 0)

    return (span(rows, 3) & span(columns, 4)).float()


def psnr(error: Tensor, weight: Tensor) -> float:
    """Mean over clips of the PSNR (peak 2) of `error` `[B, 3, ...]` where `weight` `[B, 1, ...]` is 1."""
    squared = (error.square() * weight).flatten(1).sum(1)
    count = (weight.flatten(1).sum(1) * 3).clamp(min=1)
    some = weight.flatten(1).sum(1) > 0
    return float((10 * torch.log10(4 / (squared / count).clamp(min=1e-10)))[some].mean())


@torch.no_grad()
def measure_vae(vae: WanVae, world: World, *, count: int = 64, frames: int = 33) -> dict[str, float]:
    """PSNR in dB on held-out clips: whole frames, in the object's box, first frames, later frames."""
    rows: dict[str, list[float]] = {"whole": [], "box": [], "first_frame": [], "lone_frame": []}
    for i in range(0, count, 16):
        scenes = sample_scenes(90_000 + i, min(16, count - i), split="held-out")
        pixels, mask = world.render(scenes, torch.arange(frames))
        error = reconstruct(vae, pixels) - pixels
        lone = torch.cat(
            [
                reconstruct(vae, pixels[:, :, t : t + 1]) - pixels[:, :, t : t + 1]
                for t in (frames // 3, 2 * frames // 3)
            ]
        )
        rows["whole"].append(psnr(error, torch.ones_like(mask)))
        rows["box"].append(psnr(error, boxes(mask)))
        rows["first_frame"].append(psnr(error[:, :, :1], torch.ones_like(mask[:, :, :1])))
        rows["lone_frame"].append(psnr(lone, torch.ones_like(mask[:, :, :1]).repeat(2, 1, 1, 1, 1)))
    return {k: sum(v) / len(v) for k, v in rows.items()}


@torch.no_grad()
def latent_statistics(vae: WanVae, world: World, count: int = 96) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over training clips (config 0 and 1)."""
    means = []
    for i in range(0, count, 16):
        pixels, _ = training_clips(world, 70_000 + i, 16, 33, "train")
        means.append(torch.cat([vae.encode_train(p)[0] for p in pixels.split(8)]).float())
    latents = torch.cat(means).transpose(0, 1).flatten(1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


def finish_vae(trainer: VaeTrainer, out: Path, seconds: float, count: int = 64) -> dict[str, Any]:
    """Measure, write fp16 weights with their config, a contact sheet, and a JSON of results."""
    from safetensors.torch import save_file

    torch.cuda.empty_cache()
    vae, world = trainer.averaged(), trainer.world
    results: dict[str, Any] = {
        "psnr": measure_vae(vae, world, count=count),
        "steps": trainer.run.step,
        "seconds": seconds,
    }
    mean, std = latent_statistics(vae, world)
    results["latents_mean"], results["latents_std"] = mean, std
    weights = {k: v.half().contiguous().cpu() for k, v in vae.state_dict().items()}
    save_file(
        weights,
        out / "vae.safetensors",
        metadata={"latents_mean": json.dumps(mean), "latents_std": json.dumps(std)},
    )
    (out / "vae.json").write_text(json.dumps(results, indent=1) + "\n")
    scenes = cat([sample_scenes(91_000, 8, split="held-out")])
    pixels, _ = world.render(scenes, torch.arange(33))
    both = torch.stack([pixels, reconstruct(vae, pixels)], 1).flatten(0, 1)
    save_picture(contact_sheet(both, [0, 8, 16, 23, 32]), out / "vae.png")
    logger.info("vae: %s", json.dumps(results["psnr"]))
    return results


def load_vae(path: Path, device: torch.device | str = "cpu") -> WanVae:
    """The VAE that `finish_vae` wrote, with measured latents, fp32 on `device`."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        meta = file.metadata()
        weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
    mean, std = (tuple(json.loads(meta[k])) for k in ("latents_mean", "latents_std"))
    vae = WanVae(replace(VAE_CONFIG, latents_mean=mean, latents_std=std))
    vae.load_state_dict(weights)
    return vae.to(device).eval().requires_grad_(False)
