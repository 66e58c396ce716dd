"""Videos from wan-tiny in batches: the pipeline's loop over many streams at once, for training and measuring.

The rule of the context, the schedule and the sampler are the pipeline's own (`wanrt.pipeline.context`,
`wanrt.pipeline.schedule`); what differs is that B streams advance together and noise comes from a
`torch.Generator` on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
from wanrt.models.transformer import TextKV, WanTransformer
from wanrt.models.vae import VaeState, WanVae
from wanrt.pipeline.schedule import Schedule, predict_x0, renoise

STEPS = (1000.0, 937.0, 833.0, 625.0)
"""wan-tiny's timesteps (already warped), as Krea's server has them."""

SHIFT = 5.0


@dataclass
class Streams:
    """B videos under way.

    Attributes:
        cache: of the transformer, for this batch.
        state: of the decoder.
        made: chunks made.
        head: what stands first in the next context, `[B, 16, 1, h, w]`, None before the first chunk.
        tail: the last two latents `[B, 16, 2, h, w]`.
    """

    cache: KVCache
    state: VaeState
    made: int = 0
    head: Tensor | None = None
    tail: Tensor | None = None

    def context(self) -> Tensor | None:
        """The next chunk's context `[B, 16, 3, h, w]`, None for the first chunk."""
        if self.head is None or self.tail is None:
            return None
        return torch.cat([self.head, self.tail], dim=2)


class Roller:
    """Advances streams with one transformer and one VAE; holds no state of theirs."""

    def __init__(
        self,
        transformer: WanTransformer,
        vae: WanVae,
        *,
        steps: tuple[float, ...] = STEPS,
        half: bool = False,
        anchor: str = "anchor-only",
    ) -> None:
        self.transformer, self.vae, self.anchor = transformer, vae, anchor
        self.schedule = Schedule.of(steps, SHIFT)
        self.device = transformer.patch_embedding.weight.device
        self.half = half

    def start(self, batch: int, size: tuple[int, int]) -> Streams:
        """Fresh streams; `size` is (h, w) of the latents."""
        cache = KVCache.allocate(
            self.transformer.config,
            policy=CachePolicy.RECOMPUTE,
            frames=3,
            grid=(size[0] // 2, size[1] // 2),
            batch=batch,
            device=self.device,
            dtype=torch.bfloat16 if self.half else torch.float32,
        )
        return Streams(cache, self.vae.decoder_state())

    @torch.no_grad()
    def embed(self, features: Tensor) -> TextKV:
        """Cross-attention keys and values of text features `[B, text_len, text_dim]`."""
        with self._precision():
            return self.transformer.embed_text(features)

    @torch.no_grad()
    def advance(self, streams: Streams, text: TextKV, g: torch.Generator, size: tuple[int, int]) -> Tensor:
        """Make, decode and remember one chunk; pixels `[B, 3, 9 or 12, H, W]`."""
        latents = self.make(streams, text, g, size)
        return self.accept(streams, latents)

    @torch.no_grad()
    def make(self, streams: Streams, text: TextKV, g: torch.Generator, size: tuple[int, int]) -> Tensor:
        """The next chunk's latents `[B, 16, 3, h, w]`, float32."""
        batch = streams.cache.layers[0].key.shape[0]
        context = streams.context()
        shape = (batch, 16, 3, *size)

        def fresh() -> Tensor:
            return torch.randn(shape, generator=g, device=self.device)

        with self._precision():
            if context is not None:
                zero = torch.zeros(batch, context.shape[2], device=self.device)
                self.transformer(context, zero, text, streams.cache, pass_=Pass.CONTEXT)
            noisy = clean = fresh()
            for i, (t, sigma) in enumerate(zip(self.schedule.timesteps, self.schedule.sigmas, strict=True)):
                times = torch.full((batch, 3), t, device=self.device)
                velocity = self.transformer(noisy, times, text, streams.cache, pass_=Pass.DENOISE)
                clean = predict_x0(noisy, velocity.float(), sigma)
                if i + 1 < len(self.schedule):
                    noisy = renoise(clean, fresh(), self.schedule.sigmas[i + 1])
        return clean

    @torch.no_grad()
    def accept(self, streams: Streams, latents: Tensor) -> Tensor:
        """Decode a chunk (made or given) and make it the streams' past; pixels in -1..1."""
        with self._vae_precision():
            pixels = torch.cat(
                [self.vae.decode(latents[:, :, i : i + 1], streams.state).float() for i in range(3)], 2
            )
            streams.head = self._head(streams, latents, pixels)
        streams.tail = latents[:, :, 1:].float()
        streams.made += 1
        return pixels

    def _head(self, streams: Streams, latents: Tensor, pixels: Tensor) -> Tensor:
        """First latent of the next context: the video's own after chunk 0, then the policy's anchor."""
        if streams.made == 0 or self.anchor == "latent":
            return latents[:, :, :1].float()
        if self.anchor == "first-frame":
            assert streams.head is not None
            return streams.head
        return self.vae.encode_frame(pixels[:, :, 3:4]).float()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def _vae_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.float16, enabled=self.half)
