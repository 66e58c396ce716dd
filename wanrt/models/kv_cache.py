"""Self-attention keys and values of one stream: allocated once, static shapes, explicit call order.

A cache holds up to `capacity` *context* latent frames and room for the chunk being made. Logical frame j
of the context has RoPE position j; the chunk follows at positions context_frames, context_frames + 1 and
so on. Positions are thus bounded by capacity + chunk, however long the video.

Physical order of a layer's buffer `[B, (capacity + chunk) * tokens_per_frame, heads, head_dim]`, in frames:

    | unused | context 1 .. n-1 | context 0 (the anchor) | chunk 0 .. chunk-1 |
                                 ^ capacity - 1           ^ capacity

Attention does not care about the order of keys, and this one makes three things contiguous: all keys of a
pass, the keys that carry the KV bias (context 1..n-1), and the keys that do not (anchor and chunk). A pass
hands the kernel views, never copies, and unused or padded slots are never attended.

Who fills the context:

    RECOMPUTE       Pass.CONTEXT at t=0 before each chunk rewrites it (krea-ai/realtime-video
                    `release_server.py` at acf4b7b).
    ROLLING         Pass.COMMIT of each finished chunk at t=0 appends to it and the oldest frames go
                    (guandeh17/Self-Forcing `pipeline/causal_inference.py` and
                    `wan/modules/causal_model.py` at 33593df; its `local_attn_size` counts the chunk too:
                    capacity = local_attn_size - chunk).
    SINK            as ROLLING, but the first `sink` frames of the video stay (NVlabs/LongLive at 7860ad9;
                    capacity includes the sink).

ROLLING and SINK also keep un-rotated keys, because a frame that moves to another position must be rotated
anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from wanrt.errors import RunError
from wanrt.models.config import TransformerConfig
from wanrt.models.rope import RopeTable
from wanrt_kernels.rope_norm import rope_norm


class CallOrderError(RunError):
    """A pass came at a time, or with a shape, that the cache's policy does not allow."""


class CachePolicy(StrEnum):
    """Where the context's keys and values come from; see the module's head."""

    RECOMPUTE = "recompute"
    ROLLING = "rolling"
    SINK = "sink"


class Pass(StrEnum):
    """What a forward is for.

    CONTEXT: frames attend to each other and become the context. DENOISE: a chunk attends to the context
    and itself, the context stays as it is. COMMIT: as DENOISE, then the chunk joins the context.
    """

    CONTEXT = "context"
    DENOISE = "denoise"
    COMMIT = "commit"


@dataclass(frozen=True)
class PassPlan:
    """One pass in whole numbers: everything about it that is fixed per compiled or captured graph.

    Attributes:
        pass_: what the forward is for.
        frames: latent frames that go through the transformer.
        context: context frames they attend to besides themselves; also their first RoPE position.
        keep: context frames after the pass.
    """

    pass_: Pass
    frames: int
    context: int
    keep: int


@dataclass(frozen=True)
class CacheLayer:
    """Buffers of one transformer layer; `raw_key` (un-rotated, in logical order) is None under RECOMPUTE."""

    key: Tensor
    value: Tensor
    raw_key: Tensor | None


class KVCache:
    """Self-attention keys and values of one stream. Make it with `allocate`; see the module's head for its
    layout.
    """

    def __init__(
        self,
        layers: Sequence[CacheLayer],
        rope: RopeTable,
        *,
        policy: CachePolicy,
        capacity: int,
        chunk: int,
        grid: tuple[int, int],
        sink: int,
    ) -> None:
        self.layers = tuple(layers)
        self.rope = rope
        self.policy = policy
        self.capacity = capacity
        self.chunk = chunk
        self.grid = grid
        self.sink = sink
        self._context_frames = 0

    @classmethod
    def allocate(
        cls,
        config: TransformerConfig,
        *,
        policy: CachePolicy,
        frames: int,
        grid: tuple[int, int],
        chunk: int = 3,
        sink: int = 0,
        batch: int = 1,
        heads: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        empty: Callable[[Sequence[int], torch.dtype], Tensor] | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
            config: of the transformer that will use it.
            policy: how the context is filled.
            frames: most context latent frames (the window), not counting the chunk; with SINK the sink
            counts. grid: (rows, columns) of tokens of a latent frame: (h/2, w/2).
            chunk: most latent frames of a chunk.
            sink: with SINK, how many first frames of the video stay for good, 1 <= sink <= frames.
            batch: streams side by side.
            heads: heads held here when another part of the program shards them; default all.
            device, dtype: of keys and values; the RoPE tables are fp32.
            empty: where other ranks store keys and values: makes the buffers, of zeros.

        Raises:
            ValueError: frames, chunk or sink out of range.
        """
        _check_sizes(policy, frames, chunk, sink)
        tokens = grid[0] * grid[1]

        def buffers(slots: int) -> tuple[Tensor, ...]:
            shape = (batch, slots * tokens, heads or config.num_heads, config.head_dim)
            if empty is not None:
                return empty((config.num_layers, *shape), dtype).unbind()
            # Zeros: a slot is written before it is attended, but NaN garbage would hide a mistake. Each layer's on its
            # own: inductor copies the whole of what a written tensor is a view of, from where the view begins.
            return tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers))

        raw = [None] * config.num_layers if policy is CachePolicy.RECOMPUTE else buffers(frames)
        layers = [
            CacheLayer(*parts)
            for parts in zip(buffers(frames + chunk), buffers(frames + chunk), raw, strict=True)
        ]
        rope = RopeTable.build(config.head_dim, frames + chunk, grid, device=device)
        return cls(layers, rope, policy=policy, capacity=frames, chunk=chunk, grid=grid, sink=sink)

    @property
    def context_frames(self) -> int:
        """Latent frames that the next chunk will attend to besides itself."""
        return self._context_frames

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.rope.tokens_per_frame

    def reset(self) -> None:
        """Forget the stream: the next pass is the first of a new video. Buffers stay where they are."""
        self._context_frames = 0

    def begin(self, pass_: Pass, frames: int) -> PassPlan:
        """Check that `pass_` over `frames` latent frames may come now, and say what it will do.

        Raises:
            CallOrderError: policy and pass do not fit, or too many frames, or a shrinking context.
        """
        allowed = Pass.CONTEXT if self.policy is CachePolicy.RECOMPUTE else Pass.COMMIT
        if pass_ is not Pass.DENOISE and pass_ is not allowed:
            raise CallOrderError(
                f"KV cache with policy {self.policy}: got a {pass_} pass, expected {allowed} or denoise; "
                f"allocate the cache with the policy that the model was trained for"
            )
        if pass_ is Pass.CONTEXT:
            return self._begin_context(frames)
        if not 1 <= frames <= self.chunk:
            raise CallOrderError(
                f"KV cache: got a {pass_} pass of {frames} latent frames, "
                f"expected 1 to {self.chunk} (the chunk)"
            )
        context = self._context_frames
        keep = min(context + frames, self.capacity) if pass_ is Pass.COMMIT else context
        return PassPlan(pass_, frames, context, keep)

    def _begin_context(self, frames: int) -> PassPlan:
        low = max(1, self._context_frames)
        if not low <= frames <= self.capacity:
            raise CallOrderError(
                f"KV cache: got a context pass of {frames} latent frames "
                f"after one of {self._context_frames}, expected {low} to {self.capacity}; "
                f"call reset() before a new video"
            )
        return PassPlan(Pass.CONTEXT, frames, 0, frames)

    def finish(self, plan: PassPlan) -> None:
        """Take note that the pass of `plan` has run (also after a captured graph was replayed)."""
        self._context_frames = plan.keep

    def span(self, plan: PassPlan) -> tuple[int, int]:
        """First and last+1 buffer token that a pass attends to."""
        if plan.pass_ is Pass.CONTEXT:
            return self._tokens(self.capacity - plan.frames), self._tokens(self.capacity)
        return self._tokens(self.capacity - plan.context), self._tokens(self.capacity + plan.frames)

    def biased_keys(self, plan: PassPlan) -> int:
        """How many leading keys of `span` are context other than the anchor."""
        return self._tokens(max(plan.context - 1, 0))

    def slots(self, plan: PassPlan) -> tuple[tuple[slice, slice], ...]:
        """Where a pass keeps its keys and values: pairs of (tokens of the pass, tokens of the buffer)."""
        return self._turned(plan.frames, *self.frame_slots(plan))

    def frame_slots(self, plan: PassPlan) -> tuple[int, int]:
        """`slots` as a rule, (first, turn): frame f of F is kept in frame first + (f - turn) mod F of the buffer."""
        if plan.pass_ is Pass.CONTEXT:
            return self.capacity - plan.frames, 1
        return self.capacity, 0

    def write(self, layer: CacheLayer, plan: PassPlan, key: Tensor, value: Tensor) -> None:
        """Copy rotated keys and values `[B, frames * tokens_per_frame, heads, head_dim]` to a pass's slots."""
        for tokens, slots in self.slots(plan):
            layer.key[:, slots].copy_(key[:, tokens])
            layer.value[:, slots].copy_(value[:, tokens])

    def commit(self, layer: CacheLayer, plan: PassPlan, raw_key: Tensor, value: Tensor) -> None:
        """Let the chunk of a COMMIT pass join the context and the oldest frames after the sink go.

        Args:
            layer: the buffers; its chunk must have been attended to already.
            plan: of the pass.
            raw_key: un-rotated keys of the chunk `[B, frames * tokens_per_frame, heads, head_dim]`.
            value: its values, same shape.
        """
        if layer.raw_key is None:
            raise CallOrderError(
                f"KV cache with policy {self.policy}: got commit, expected context or denoise"
            )
        raw = self._roll(layer.raw_key[:, : self._tokens(plan.context)], raw_key, plan)
        values = self._roll(self._logical_values(layer, plan.context), value, plan)
        layer.raw_key[:, : raw.shape[1]].copy_(raw)
        flat, cos, sin = raw.flatten(2), self.rope.cos, self.rope.sin
        for tokens, slots in self._turned(plan.keep, self.capacity - plan.keep, 1):
            out = layer.key[:, slots]
            rope_norm(
                flat[:, tokens], None, cos[tokens], sin[tokens], head_dim=out.shape[3], eps=0.0, out=out
            )
            layer.value[:, slots].copy_(values[:, tokens])

    def _roll(self, context: Tensor, chunk: Tensor, plan: PassPlan) -> Tensor:
        """Context and chunk in logical order, without the oldest frames that no longer fit."""
        gone = plan.context + plan.frames - plan.keep
        both = torch.cat((context, chunk), dim=1)
        if gone == 0:
            return both
        lo, hi = self._tokens(self.sink), self._tokens(self.sink + gone)
        return torch.cat((both[:, :lo], both[:, hi:]), dim=1)

    def _logical_values(self, layer: CacheLayer, context: int) -> Tensor:
        lo, anchor, end = (self._tokens(self.capacity - n) for n in (context, 1, 0))
        if context == 0:
            return layer.value[:, :0]
        return torch.cat((layer.value[:, anchor:end], layer.value[:, lo:anchor]), dim=1)

    def _turned(self, frames: int, first: int, turn: int) -> tuple[tuple[slice, slice], ...]:
        """As `slots`, for the rule of `frame_slots`: the first `turn` frames come last."""
        start, middle, end = (self._tokens(first + n) for n in (0, frames - turn, frames))
        cut = end - middle
        pairs = (slice(0, cut), slice(middle, end)), (slice(cut, end - start), slice(start, middle))
        return tuple(pair for pair in pairs if pair[0].stop > pair[0].start)

    def _tokens(self, frames: int) -> int:
        return frames * self.rope.tokens_per_frame


def _check_sizes(policy: CachePolicy, frames: int, chunk: int, sink: int) -> None:
    if frames < 1 or chunk < 1:
        raise ValueError(f"KV cache: got frames={frames}, chunk={chunk}, expected both at least 1")
    low, high = (1, frames) if policy is CachePolicy.SINK else (0, 0)
    if not low <= sink <= high:
        raise ValueError(
            f"KV cache with policy {policy}, {frames} frames: got sink={sink}, expected {low} to {high}"
        )
