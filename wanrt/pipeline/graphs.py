"""CUDA graphs of the transformer's passes and of a prompt's way in: one launch instead of some hundred or thousand.

Every pass that a stream will ever make is known beforehand: the context grows by a chunk until it fills the window,
then nothing changes any more. Each is captured once, before the first chunk; prompt, bias, timesteps and latents
live at fixed addresses, so changing them captures nothing anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from wanrt.models.cuda_graph import CapturedCall
from wanrt.models.kv_cache import CachePolicy, Pass, PassPlan
from wanrt.models.transformer import pad_text
from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.denoiser import TransformerDenoiser

if TYPE_CHECKING:
    from wanrt.models.kv_cache import KVCache
    from wanrt.models.transformer import TextKV, TimeEmbedding, WanTransformer

log = logging.getLogger("wanrt.pipeline")

WARM_UP_RUNS = 2  # all is chosen and allocated in the first; the second shows it


class GraphedText:
    """A prompt's way into `text`, whose keys and values stay where they are, captured.

    Launched one by one, its kernels kept the host of a mesh rank for 8 to 48 ms (64 layers, H100): longer than the
    chunk under way covers.
    """

    def __init__(
        self, model: WanTransformer, text: TextKV, batch: int, device: torch.device, pool: Any
    ) -> None:
        config = self._config = model.config
        self._padded = torch.zeros(batch, config.text_len, config.text_dim, dtype=model.dtype, device=device)

        def run() -> None:
            model.embed_text_into(text, self._padded)

        self._call = CapturedCall(run, device, warm_up=WARM_UP_RUNS, pool=pool)

    def __call__(self, embedding: torch.Tensor) -> None:
        """Replay with another prompt, `[B, L, text_dim]`."""
        self._padded.copy_(pad_text(embedding, self._config))
        self._call.replay()

    def close(self) -> None:
        """Gives the graph up, whoever still holds this object."""
        self._call.close()


class GraphedForward:
    """One pass of `model`, captured for one plan: static latents, time embedding, prompt, bias and cache.

    `time` is this graph's own home for it, or shared with graphs whose replays never overlap with this one's, as
    is `pool`, the memory of another graph.
    """

    def __init__(
        self,
        model: WanTransformer,
        cache: KVCache,
        plan: PassPlan,
        latents: torch.Tensor,
        time: TimeEmbedding,
        text: TextKV,
        bias: torch.Tensor | None,
        pool: Any,
    ) -> None:
        self._latents = latents.clone()
        self._time = time

        def run() -> torch.Tensor | None:
            return model.run(self._latents, time, text, cache, plan, bias)

        self._call = CapturedCall(run, latents.device, warm_up=WARM_UP_RUNS, pool=pool)
        self.pool = self._call.pool

    def __call__(self, latents: torch.Tensor, time: TimeEmbedding) -> torch.Tensor | None:
        """Replay. The velocity is overwritten by the next replay of any graph of the pool: use it before."""
        self._latents.copy_(latents)
        self._time.copy_(time)
        return self._call.replay()

    def close(self) -> None:
        """Gives the graph up, whoever still holds this object."""
        self._call.close()


class GraphedDenoiser(TransformerDenoiser):
    """A `TransformerDenoiser` whose passes are graphs, captured by `capture` before the first chunk."""

    def __init__(self, model: WanTransformer, cache: KVCache, device: torch.device) -> None:
        super().__init__(model, cache, device)
        self._graphs: dict[tuple[PassPlan, bool], GraphedForward] = {}
        self._log_bias = torch.zeros((), device=device)
        self._static: TimeEmbedding  # where the graphs read theirs
        self._text_graph: GraphedText | None = None

    def set_text(self, embedding: torch.Tensor) -> None:
        """The prompt's keys and values, at the address that the graphs read."""
        if self._text_graph is None:
            super().set_text(embedding)
        else:
            self._text_graph(embedding.to(self.device))

    def set_bias(self, bias: float) -> None:
        """As in the eager denoiser, at the address that the graphs read."""
        self._log_bias.fill_(math.log(bias))
        self._bias = None if bias == 1.0 else self._log_bias

    def capture(
        self, shape: tuple[int, ...], biased: Iterable[bool], progress: Callable[[int, int], None]
    ) -> None:
        """Captures every pass for chunks of `shape` `[B, 16, 3, h, w]`, and the prompt's way in; resets the cache.

        `biased`: with and without attention bias are different graphs; name those that will be needed, the other
        runs eagerly. `progress` hears how many of how many are done.
        """
        started = time.perf_counter()
        wanted = [(plan, on) for on in sorted(set(biased)) for plan in all_plans(self._cache)]
        distinct = list(dict.fromkeys((plan, on and plan.pass_ is not Pass.CONTEXT) for plan, on in wanted))
        latents = torch.zeros(shape, device=self.device)
        with torch.inference_mode():
            self.set_text(torch.zeros(shape[0], 1, self._model.config.text_dim, device=self.device))
            self._static = self._model.embed_time(torch.zeros(shape[0], 1, device=self.device))
            captures = [
                partial(self._capture, plan, latents, self._log_bias if on else None) for plan, on in distinct
            ]
            captures.append(partial(self._capture_text, shape[0]))
            try:
                for done, capture in enumerate(captures):
                    progress(done, len(captures))
                    capture()
            except BaseException:
                self.close()
                raise
        self._cache.reset()
        log.info("captured %d CUDA graphs in %.1f s", len(captures), time.perf_counter() - started)

    def _capture(self, plan: PassPlan, latents: torch.Tensor, bias: torch.Tensor | None) -> None:
        assert self._text is not None
        frames = latents[:, :, :1].expand(-1, -1, plan.frames, -1, -1)
        forward = GraphedForward(
            self._model, self._cache, plan, frames, self._static, self._text, bias, self._pool()
        )
        self._graphs[plan, bias is not None] = forward

    def _capture_text(self, batch: int) -> None:
        assert self._text is not None
        self._text_graph = GraphedText(self._model, self._text, batch, self.device, self._pool())

    def _pool(self) -> Any:
        """The memory of all graphs: none is replayed beside another."""
        return next((graph.pool() for graph in self._graphs.values()), None)

    def close(self) -> None:
        """See `Denoiser.close`: NCCL waits for the graphs of a sharded model."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        if self._text_graph is not None:
            self._text_graph.close()
            self._text_graph = None

    def _run(
        self, latents: torch.Tensor, time: TimeEmbedding, plan: PassPlan, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        graph = self._graphs.get((plan, bias is not None))
        return super()._run(latents, time, plan, bias) if graph is None else graph(latents, time)


def all_plans(cache: KVCache) -> tuple[PassPlan, ...]:
    """Every pass of a stream, the steady ones first: they need the most memory, which the others then share."""
    fills = sorted(
        {min(made, cache.capacity) for made in range(0, cache.capacity + CHUNK_LATENTS, CHUNK_LATENTS)}
    )
    plans: list[PassPlan] = []
    for held in reversed(fills):
        if cache.policy is CachePolicy.RECOMPUTE and held:
            plans.append(PassPlan(Pass.CONTEXT, held, 0, held))
        plans.append(PassPlan(Pass.DENOISE, CHUNK_LATENTS, held, held))
        if cache.policy is not CachePolicy.RECOMPUTE:
            keep = min(held + CHUNK_LATENTS, cache.capacity)
            plans.append(PassPlan(Pass.COMMIT, CHUNK_LATENTS, held, keep))
    return tuple(plans)
