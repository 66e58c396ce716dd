"""CUDA graphs of the transformer's passes: one launch a forward instead of some thousand.

Every pass that a stream will ever make is known beforehand: the context grows by a chunk until it fills the window,
then nothing changes any more. Each is captured once, before the first chunk; prompt, bias, timesteps and latents
live at fixed addresses, so changing them captures nothing anew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from wanrt.models.kv_cache import CachePolicy, Pass, PassPlan
from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.denoiser import TransformerDenoiser

if TYPE_CHECKING:
    from wanrt.models.kv_cache import KVCache
    from wanrt.models.transformer import TextKV, TimeEmbedding, WanTransformer

log = logging.getLogger("wanrt.pipeline")

WARM_UP_RUNS = 2  # libraries choose kernels and allocate workspaces in the first; capture must see neither


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
        self.plan = plan
        self._latents = latents.clone()
        self._time = time

        def run() -> torch.Tensor | None:
            return model.run(self._latents, time, text, cache, plan, bias)

        side = torch.cuda.Stream(latents.device)
        side.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                run()
        side.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the panel asks the driver for free memory from its own thread meanwhile
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self._velocity = run()
        torch.cuda.current_stream(latents.device).wait_stream(side)

    def __call__(self, latents: torch.Tensor, time: TimeEmbedding) -> torch.Tensor | None:
        """Replay. The velocity is overwritten by the next replay of any graph of the pool: use it before."""
        self._latents.copy_(latents)
        self._time.copy_(time)
        self.graph.replay()
        return self._velocity

    def close(self) -> None:
        """Gives the graph up, whoever still holds this object."""
        self.graph.reset()


class GraphedDenoiser(TransformerDenoiser):
    """A `TransformerDenoiser` whose passes are graphs, captured by `capture` before the first chunk."""

    def __init__(self, model: WanTransformer, cache: KVCache, device: torch.device) -> None:
        super().__init__(model, cache, device)
        self._graphs: dict[tuple[PassPlan, bool], GraphedForward] = {}
        self._log_bias = torch.zeros((), device=device)
        self._static: TimeEmbedding  # where the graphs read theirs

    def set_text(self, embedding: torch.Tensor) -> None:
        """The prompt's keys and values, at the address that the graphs read."""
        fresh = self._model.embed_text(embedding.to(self.device))
        self._text = fresh if self._text is None else self._text.copy_(fresh)

    def set_bias(self, bias: float) -> None:
        """As in the eager denoiser, at the address that the graphs read."""
        self._log_bias.fill_(math.log(bias))
        self._bias = None if bias == 1.0 else self._log_bias

    def capture(
        self, shape: tuple[int, ...], biased: Iterable[bool], progress: Callable[[int, int], None]
    ) -> None:
        """Captures every pass for chunks of `shape` `[B, 16, 3, h, w]`; resets the cache.

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
            try:
                for done, (plan, on) in enumerate(distinct):
                    progress(done, len(distinct))
                    self._capture(plan, latents, self._log_bias if on else None)
            except BaseException:
                self.close()
                raise
        self._cache.reset()
        log.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.perf_counter() - started)

    def _capture(self, plan: PassPlan, latents: torch.Tensor, bias: torch.Tensor | None) -> None:
        assert self._text is not None
        frames = latents[:, :, :1].expand(-1, -1, plan.frames, -1, -1)
        pool = next((graph.graph.pool() for graph in self._graphs.values()), None)
        forward = GraphedForward(self._model, self._cache, plan, frames, self._static, self._text, bias, pool)
        self._graphs[plan, bias is not None] = forward

    def close(self) -> None:
        """See `Denoiser.close`: NCCL waits for the graphs of a sharded model."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

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
