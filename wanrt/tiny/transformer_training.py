"""Training of wan-tiny's transformer and text encoder, together, on encoded clips.

Flow matching: x_t = (1 - sigma) x0 + sigma noise, the model predicts noise - x0. The context is the
pipeline's, to the letter; the four sampling timesteps get most of the draws; the object's latents weigh ten
times the background's; a linear read-out of the text features must name the attributes. Later the context
comes from the model's own videos (self-rollouts), with the world's truth for the same phase as the target.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanrt.models.text_encoder import TextEncoderConfig, UMT5Encoder
from wanrt.models.transformer import Block, TextKV, TransformerConfig, WanTransformer
from wanrt.models.vae import WanVae
from wanrt.pipeline.schedule import nearest_sigma
from wanrt.tiny import training
from wanrt.tiny.captions import TEXT_LEN, vocabulary
from wanrt.tiny.corpus import NO_CUT, Corpus
from wanrt.tiny.rollout import SHIFT, STEPS, Roller, Streams
from wanrt.tiny.scenes import ATTRIBUTES
from wanrt.tiny.training import Budget, Clock, Ranks

logger = logging.getLogger("wanrt.tiny")

TEXT_CONFIG = TextEncoderConfig(
    vocab=-(-len(vocabulary()) // 8) * 8, dim=192, attn_dim=192, ffn_dim=384, num_heads=4, num_layers=3
)
TRANSFORMER_CONFIG = TransformerConfig(
    dim=320, ffn_dim=1024, num_layers=8, num_heads=8, text_dim=TEXT_CONFIG.dim, text_len=TEXT_LEN
)

CLASSES = tuple(len(v) + (k == "shape") for k, v in ATTRIBUTES.items())
"""Classes of the read-out: no object is one more shape."""


FILES = {"transformer": "transformer", "text_encoder": "text"}
"""File name of an exported part, and its name in `Learner`."""


@dataclass(frozen=True)
class TransformerRecipe:
    """How the transformer is trained; `batch` chunks per rank and step."""

    seed: int = 1
    budget: Budget = field(default_factory=lambda: Budget(minutes=7.0))
    batch: int = 128
    lr: float = 1e-3
    optimizer: str = "muon"
    object_weight: float = 9.0
    context_noise: float = 0.1
    own_steps: float = 0.6
    first_share: float = 0.2
    read_out: float = 0.05
    rollout_from: float = 1.1
    rollout_share: float = 0.5
    rollout_batch: int = 64
    rollout_chunks: int = 16
    rollout_every: int = 6
    compiled: bool = False
    half: bool = True


class ReadOut(nn.Module):
    """Attributes from the mean of the text features: an auxiliary task, not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(TEXT_CONFIG.dim, sum(CLASSES))

    def forward(self, features: Tensor, keep: Tensor) -> Tensor:
        """Features `[B, L, D]` and mask `[B, L]` to joined logits."""
        return self.linear((features * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


def read_out_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the four attributes; without an object only shape and background count."""
    has_object = (labels[:, 0] < len(ATTRIBUTES["shape"])).float()
    total = logits.new_zeros(())
    for i, part in enumerate(logits.float().split(CLASSES, dim=1)):
        each = F.cross_entropy(part, labels[:, i], reduction="none")
        total = total + (each * has_object if i in (1, 2) else each).mean()
    return total


@torch.no_grad()
def start_weights_(model: WanTransformer) -> None:
    """Small heads, open residual gates, no modulation at first: a plain pre-norm transformer to begin with."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.head.head.weight)
    nn.init.normal_(model.time_projection[1].weight, std=0.02)  # type: ignore[arg-type]
    for block in model.blocks:
        assert isinstance(block, Block)
        block.modulation.zero_()
        block.modulation[:, (2, 5)] = 0.4
    model.head.modulation.zero_()


class Learner(nn.Module):
    """Transformer, text encoder and read-out as one function from a batch to its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer(TRANSFORMER_CONFIG)
        self.text = UMT5Encoder(TEXT_CONFIG)
        self.read = ReadOut()
        start_weights_(self.transformer)

    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Text features `[B, L, D]`, zero after the end mark, and the mask."""
        keep = (tokens != 0).float()
        return self.text(tokens, keep) * keep[..., None], keep

    def forward(
        self, tokens: Tensor, labels: Tensor, context: Tensor | None, noisy: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity of the chunk and the read-out's loss; sigma `[B]`."""
        features, keep = self.features(tokens)
        text: TextKV = self.transformer.embed_text(features)
        t = (1000 * sigma)[:, None].expand(-1, noisy.shape[2])
        zero = None if context is None else torch.zeros(len(sigma), context.shape[2], device=sigma.device)
        velocity = self.transformer.forward_train(context, zero, noisy, t, text)
        return velocity, read_out_loss(self.read(features, keep), labels)


def draw_sigmas(count: int, own: float, g: torch.Generator) -> Tensor:
    """`[count]`: one of the four sampling sigmas with probability `own`, else shifted uniform."""
    device = g.device
    four = torch.tensor([nearest_sigma(t, SHIFT) for t in STEPS], device=device)
    pick = four[torch.randint(len(four), (count,), generator=g, device=device)]
    s = torch.rand(count, generator=g, device=device)
    spread = SHIFT * s / (1 + (SHIFT - 1) * s)
    return torch.where(torch.rand(count, generator=g, device=device) < own, pick, spread)


class OwnPast:
    """Contexts out of the model's own videos: streams that go on from refresh to refresh.

    Stream i shows clip `clip[i]`; after `chunks` chunks all start anew with other clips. Every few chunks
    a quarter of the streams changes its clip without a new start: a prompt change.
    """

    def __init__(self, corpus: Corpus, vae: WanVae, batch: int, chunks: int, seed: int, rank: int) -> None:
        self.corpus, self.vae, self.batch, self.chunks = corpus, vae, batch, chunks
        self.seed, self.rank, self.count = seed, rank, 0
        self.uncut = (corpus.cut == NO_CUT).nonzero()[:, 0]
        self.streams: Streams | None = None
        self.clip = self.uncut[:batch]
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.keep = 3 * chunks

    def refresh(self, learner: Learner, half: bool) -> None:
        """Advance every stream by one chunk and keep the contexts that it made."""
        self.count += 1
        size = tuple(self.corpus.latents.shape[-2:])
        g = training.generator(self.clip.device, self.seed, self.count, self.rank, 11)
        roller = Roller(learner.transformer, self.vae, half=half)
        if self.streams is None or self.streams.made >= self.chunks:
            self.streams = roller.start(self.batch, (size[0], size[1]))
            self.clip = self._other(g)
        elif self.streams.made % 5 == 4:
            change = torch.rand(self.batch, generator=g, device=g.device) < 0.25
            self.clip = torch.where(change, self._other(g), self.clip)
        phase = torch.full_like(self.clip, phase_of(self.streams.made))
        if (context := self.streams.context()) is not None:
            self.kept.append((self.clip, phase, context.half()))
            self.kept = self.kept[-self.keep :]
        pick = torch.randint(self.corpus.tokens.shape[2], (self.batch,), generator=g, device=g.device)
        tokens, _ = self.corpus.text(self.clip, phase, pick)
        with torch.no_grad(), torch.autocast(g.device.type, torch.bfloat16, enabled=half):
            features, _ = learner.features(tokens)
        # Blocks compiled for training do not fit a pass over the cache.
        with torch.compiler.set_stance("force_eager"):
            roller.advance(self.streams, roller.embed(features), g, (size[0], size[1]))

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clips, chunks and own contexts `[count, 16, 3, h, w]` out of what is kept."""
        clip, chunk, context = (torch.cat([k[i] for k in self.kept]) for i in range(3))
        rows = torch.randint(len(clip), (count,), generator=g, device=clip.device)
        return clip[rows], chunk[rows], context[rows].float()

    def _other(self, g: torch.Generator) -> Tensor:
        return self.uncut[torch.randint(len(self.uncut), (self.batch,), generator=g, device=g.device)]


def phase_of(made: int) -> int:
    """The corpus's chunk with the truth of the video's chunk number `made`."""
    return made if made < 2 else 2 + (made - 2) % 4


class TransformerTrainer:
    """The loop."""

    def __init__(self, recipe: TransformerRecipe, corpus: Corpus, vae: WanVae, ranks: Ranks) -> None:
        self.recipe, self.corpus, self.vae, self.ranks = recipe, corpus, vae, ranks
        torch.manual_seed(recipe.seed)
        self.learner = Learner().to(ranks.device)
        self.run = training.make_run(
            list(self.learner.named_parameters()),
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            matrix=lambda name, p: name.startswith("transformer.blocks.") and p.ndim == 2,
            average=0.999,
        )
        if recipe.compiled:
            for block in self.learner.transformer.blocks:
                block.compile(dynamic=False)
        self.past = OwnPast(corpus, vae, recipe.rollout_batch, recipe.rollout_chunks, recipe.seed, ranks.rank)

    def _true_past(self, first: bool, g: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.ranks.device
        clip = torch.randint(len(self.corpus), (count,), generator=g, device=device)
        if first:
            return clip, torch.zeros_like(clip), None
        chunk = torch.randint(1, self.corpus.anchors.shape[1], (count,), generator=g, device=device)
        return clip, chunk, self.corpus.context(clip, chunk)

    def batch(self, progress: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clips, chunks, contexts of one step; whether it is a step of first chunks is the same on all ranks."""
        r, step = self.recipe, self.run.step
        g = training.generator(self.ranks.device, r.seed, step, self.ranks.rank, 1)
        first = float(torch.rand(1, generator=training.generator("cpu", r.seed, step, 2))) < r.first_share
        if first or progress < r.rollout_from or not self.past.kept:
            return self._true_past(first, g, r.batch)
        own = int(r.batch * r.rollout_share)
        clip, chunk, context = self._true_past(False, g, r.batch - own)
        own_clip, own_chunk, own_context = self.past.draw(own, g)
        assert context is not None
        return torch.cat([clip, own_clip]), torch.cat([chunk, own_chunk]), torch.cat([context, own_context])

    def losses(self, clip: Tensor, chunk: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weighted flow-matching loss and the read-out's."""
        r = self.recipe
        g = training.generator(self.ranks.device, r.seed, self.run.step, self.ranks.rank, 3)
        device, count = self.ranks.device, len(clip)
        clean, mask = self.corpus.target(clip, chunk)
        pick = torch.randint(self.corpus.tokens.shape[2], (count,), generator=g, device=device)
        tokens, labels = self.corpus.text(clip, chunk, pick)
        sigma = draw_sigmas(count, r.own_steps, g)
        noise = torch.randn(clean.shape, generator=g, device=device)
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * clean + s * noise
        if context is not None:
            level = r.context_noise * torch.rand(count, 1, 1, 1, 1, generator=g, device=device)
            context = context + level * torch.randn(context.shape, generator=g, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=r.half):
            velocity, read = self.learner(tokens, labels, context, noisy, sigma)
        weight = 1 + r.object_weight * mask
        error = (velocity.float() - (noise - clean)).square()
        return (weight * error).mean() / weight.mean(), read

    def step(self, progress: float) -> dict[str, Tensor]:
        """One update; returns 0-dim losses on the device."""
        loss, read = self.losses(*self.batch(progress))
        (loss + self.recipe.read_out * read).backward()
        norm = self.run.update(self.ranks, self.recipe.budget.rate(self.run.step, progress), clip=1.0)
        return {"loss": loss.detach(), "read": read.detach(), "norm": norm}

    def train(self, out: Path, save_every: float = 60.0) -> None:
        """Run through the budget; checkpoints go to `out`/transformer.pt."""
        r = self.recipe
        clock = Clock(r.budget, self.ranks, self.run.progress)
        begun = last = time.monotonic()
        while (progress := clock.at(self.run.step)) < 1.0:
            self.run.progress = progress
            if progress >= r.rollout_from and (self.run.step % r.rollout_every == 0 or not self.past.kept):
                for _ in range(1 if self.past.kept else 6):
                    self.past.refresh(self.learner, r.half)
            losses = self.step(progress)
            if self.run.step % 100 == 0 and self.ranks.leads:
                values = " ".join(f"{k} {float(v):.4f}" for k, v in losses.items())
                spent = time.monotonic() - begun
                logger.info(
                    "transformer step %d (%.0f %%, %.0f s): %s", self.run.step, 100 * progress, spent, values
                )
            if self.ranks.leads and time.monotonic() - last > save_every:
                training.save(self.run.state(), out / "transformer.pt")
                last = time.monotonic()
        self.run.progress = clock.progress
        if self.ranks.leads:
            training.save(self.run.state(), out / "transformer.pt")

    @torch.no_grad()
    def probe(self, corpus: Corpus, count: int = 256) -> dict[str, float]:
        """Weighted loss of the averaged weights at each sampling sigma, first and later chunks, on `corpus`."""
        self.run.average.swap(self.run.params)
        out: dict[str, float] = {}
        device = self.ranks.device
        for name, first in (("first", True), ("later", False)):
            g = training.generator(device, 77, int(first))
            clip = torch.randint(len(corpus), (count,), generator=g, device=device)
            chunk = torch.zeros_like(clip)
            if not first:
                chunk = torch.randint(1, 6, (count,), generator=g, device=device)
            context = None if first else corpus.context(clip, chunk)
            clean, mask = corpus.target(clip, chunk)
            tokens, labels = corpus.text(clip, chunk, torch.zeros_like(clip))
            noise = torch.randn(clean.shape, generator=g, device=device)
            for t in STEPS:
                sigma = torch.full((count,), nearest_sigma(t, SHIFT), device=device)
                s = sigma[:, None, None, None, None]
                with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.half):
                    v, _ = self.learner(tokens, labels, context, (1 - s) * clean + s * noise, sigma)
                weight = 1 + self.recipe.object_weight * mask
                error = (weight * (v.float() - noise + clean).square()).mean() / weight.mean()
                out[f"{name}_{t:.0f}"] = float(error)
        self.run.average.swap(self.run.params)
        return out


def export(run: training.Run, out: Path) -> None:
    """Write the averaged transformer and text encoder as fp16 safetensors, in Wan's names."""
    from safetensors.torch import save_file

    shadow = dict(zip(run.names, run.average.shadow, strict=True))
    for name, module in FILES.items():
        prefix = module + "."
        weights = {k.removeprefix(prefix): v for k, v in shadow.items() if k.startswith(prefix)}
        save_file({k: v.half().contiguous().cpu() for k, v in weights.items()}, out / f"{name}.safetensors")


def import_weights(run: training.Run, folder: Path) -> None:
    """Start `run` from what `export` wrote; the read-out starts anew."""
    from safetensors.torch import load_file

    source: dict[str, Tensor] = {}
    for name, module in FILES.items():
        source |= {f"{module}.{k}": v for k, v in load_file(folder / f"{name}.safetensors").items()}
    with torch.no_grad():
        for name, p, a in zip(run.names, run.params, run.average.shadow, strict=True):
            if name in source:
                p.copy_(source[name])
                a.copy_(source[name])


def load_models(folder: Path, device: torch.device | str = "cpu") -> tuple[WanTransformer, UMT5Encoder]:
    """Read what `export` wrote; fp32, eval mode."""
    from safetensors.torch import load_file

    models: tuple[WanTransformer, UMT5Encoder] = (
        WanTransformer(TRANSFORMER_CONFIG),
        UMT5Encoder(TEXT_CONFIG),
    )
    for model, name in zip(models, FILES, strict=True):
        model.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()})
        model.to(device).eval().requires_grad_(False)
    return models
