"""A causal Wan transformer with its cache, as the mesh's `Denoiser`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from wanrt.models.kv_cache import Pass

if TYPE_CHECKING:
    from wanrt.models.kv_cache import KVCache, PassPlan
    from wanrt.models.transformer import TextKV, TimeEmbedding, WanTransformer

# Embeddings of timesteps, 4.9 MB each at 14B: the few of a step list, and those before a change.
TIMES_KEPT = 16


class TransformerDenoiser:
    """One stream on one device (or on one rank of a sharded model). Eager: every call launches its kernels."""

    def __init__(self, model: WanTransformer, cache: KVCache, device: torch.device) -> None:
        self.device = device
        self._model, self._cache = model, cache
        self._text: TextKV | None = None
        self._bias: torch.Tensor | None = None
        self._times: dict[float, TimeEmbedding] = {}

    def set_text(self, embedding: torch.Tensor) -> None:
        """Cross-attention keys and values of a prompt `[B, L, text_dim]`."""
        self._text = self._model.embed_text(embedding.to(self.device))

    def set_bias(self, bias: float) -> None:
        """b = 1 takes the path without bias, which costs less; any other b is log(b) on the device."""
        self._bias = None if bias == 1.0 else torch.full((), math.log(bias), device=self.device)

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

    def close(self) -> None:
        """Nothing is captured here."""

    def _forward(self, latents: torch.Tensor, timestep: float, pass_: Pass) -> torch.Tensor | None:
        plan = self._cache.begin(pass_, latents.shape[2])
        bias = None if pass_ is Pass.CONTEXT else self._bias
        velocity = self._run(latents, self._time(timestep, latents.shape[0]), plan, bias)
        self._cache.finish(plan)
        return velocity

    def _run(
        self, latents: torch.Tensor, time: TimeEmbedding, plan: PassPlan, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        assert self._text is not None, "set_text comes before the first pass"
        return self._model.run(latents, time, self._text, self._cache, plan, bias)

    def _time(self, timestep: float, batch: int) -> TimeEmbedding:
        """The embedding of one timestep for all frames; a stream comes back to the same few."""
        known = self._times.pop(timestep, None)
        if known is None:
            known = self._model.embed_time(torch.full((batch, 1), timestep, device=self.device))
        self._times[timestep] = known  # newest last
        while len(self._times) > TIMES_KEPT:
            del self._times[next(iter(self._times))]
        return known
