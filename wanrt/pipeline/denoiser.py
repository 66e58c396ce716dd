"""A causal Wan transformer with its cache, as the mesh's `Denoiser`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from wanrt.models.kv_cache import Pass
from wanrt.pipeline.context import CHUNK_LATENTS

if TYPE_CHECKING:
    from wanrt.models.kv_cache import KVCache
    from wanrt.models.transformer import TextKV, WanTransformer


class TransformerDenoiser:
    """One stream on one device (or on one rank of a sharded model). Eager: every call launches its kernels."""

    def __init__(self, model: WanTransformer, cache: KVCache, device: torch.device) -> None:
        self.device = device
        self._model, self._cache = model, cache
        self._text: TextKV | None = None
        self._bias: torch.Tensor | None = None
        self._timesteps: dict[tuple[float, int], torch.Tensor] = {}

    def set_text(self, embedding: torch.Tensor) -> None:
        """Cross-attention keys and values of a prompt `[B, L, text_dim]`."""
        self._text = self._model.embed_text(embedding.to(self.device))

    def set_bias(self, bias: float) -> None:
        """b = 1 takes the path without bias, which costs less; any other b is log(b) on the device."""
        self._bias = None if bias == 1.0 else torch.tensor(math.log(bias), device=self.device)

    def context(self, latents: torch.Tensor) -> None:
        """Context pass over `[B, 16, F, h, w]`."""
        self._forward(latents, 0.0, Pass.CONTEXT)

    def denoise(self, latents: torch.Tensor, timestep: float) -> torch.Tensor:
        """Velocity of a chunk, in the latents' dtype."""
        velocity = self._forward(latents, timestep, Pass.DENOISE)
        assert velocity is not None
        return velocity

    def commit(self, latents: torch.Tensor) -> None:
        """Commit pass over a finished chunk."""
        self._forward(latents, 0.0, Pass.COMMIT)

    def _forward(self, latents: torch.Tensor, timestep: float, pass_: Pass) -> torch.Tensor | None:
        assert self._text is not None, "set_text comes before the first pass"
        times = self._times(timestep, latents.shape[0], latents.shape[2])
        bias = None if pass_ is Pass.CONTEXT else self._bias
        return self._model(latents, times, self._text, self._cache, pass_=pass_, bias=bias)

    def _times(self, timestep: float, batch: int, frames: int) -> torch.Tensor:
        key = (timestep, frames)
        if key not in self._timesteps:
            shape = (batch, max(frames, CHUNK_LATENTS))
            self._timesteps[key] = torch.full(shape, timestep, device=self.device)[:, :frames]
        return self._timesteps[key]
