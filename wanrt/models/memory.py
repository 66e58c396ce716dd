"""What a layer's self-attention attends to: a KV cache at inference, the sequence itself in training.

A layer hands raw projections over; norms, rotary positions, storing and attending happen here, so that they can be
fused, sharded or exchanged between ranks without a word in the layer. Shapes: B batch, T tokens, C channels,
H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wanrt.models.attention import AttentionBackend, KeyBias, attend
from wanrt.models.kv_cache import CacheLayer, KVCache, Pass, PassPlan
from wanrt.models.rope import RopeTable
from wanrt_kernels.adaln import add_norm, add_norm_rows
from wanrt_kernels.quant_rows import Rows
from wanrt_kernels.rope_norm import rope_norm


def in_passing(projections: Sequence[Tensor]) -> tuple[None, ...]:
    """No squares beforehand: `rope_norm` sees whole tokens and finds them in passing."""
    return (None,) * len(projections)


@dataclass(frozen=True)
class Elementwise:
    """What runs between matrix products. Replace one to shard or to measure; see the kernels for the contracts.

    Attributes:
        add_norm: finish a residual and normalise, as `wanrt_kernels.adaln.add_norm`.
        rope_norm: RMSNorm over all heads and rotary positions, as `wanrt_kernels.rope_norm.rope_norm`.
        mean_squares: of several projections `[B, T, C]` at once, what `rope_norm` must know of them where their
            channels are spread over ranks, `[B, T, N]` each; None where it sees all channels itself.
        add_norm_rows: `add_norm` for products in fp8, as `wanrt_kernels.adaln.add_norm_rows`.
    """

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_norm: Callable[..., Tensor]
    mean_squares: Callable[[Sequence[Tensor]], Sequence[Tensor | None]] = in_passing
    add_norm_rows: Callable[..., tuple[Tensor, Rows]] = add_norm_rows


LOCAL = Elementwise(add_norm, rope_norm)  # whole tokens on this device


@dataclass(frozen=True)
class QKNorm:
    """The norms of a layer's queries and keys: weights `[C]` (None: no norm) and how to split heads."""

    query: Tensor | None
    key: Tensor | None
    head_dim: int
    eps: float


class Memory(Protocol):
    """What a layer's self-attention attends to: the cache at inference, the sequence itself in training."""

    @property
    def ops(self) -> Elementwise:
        """What runs between matrix products."""
        ...

    @property
    def backend(self) -> AttentionBackend:
        """What computes attention."""
        ...

    def attend(self, norms: QKNorm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output `[B, T, H, D]` of raw projections `[B, T, C]`."""
        ...

    def remember(self, norms: QKNorm, k: Tensor, v: Tensor) -> None:
        """Keep keys and values when nothing further of this layer is needed."""
        ...


def turn(
    ops: Elementwise,
    x: Tensor,
    weight: Tensor | None,
    norms: QKNorm,
    rope: RopeTable | None,
    out: Tensor | None = None,
    mean_squares: Tensor | None = None,
) -> Tensor:
    """Norm and rotary positions of a projection `[B, T, C]`, as heads `[B, T, H, D]`.

    `mean_squares`: from `Elementwise.mean_squares`, if it was asked.
    """
    cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
    return ops.rope_norm(
        x, weight, cos, sin, head_dim=norms.head_dim, eps=norms.eps, out=out, mean_squares=mean_squares
    )


@dataclass(frozen=True)
class CachedMemory:
    """One layer's share of a pass over a `KVCache`."""

    cache: KVCache
    layer: CacheLayer
    plan: PassPlan
    rope: RopeTable
    bias: KeyBias | None
    backend: AttentionBackend
    ops: Elementwise

    def attend(self, norms: QKNorm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the pass's keys and values, attend to all that the plan names, then commit if asked to."""
        q_squares, k_squares = self.ops.mean_squares((q, k))
        self._write(norms, k, v, k_squares)
        lo, hi = self.cache.span(self.plan)
        q = turn(self.ops, q, norms.query, norms, self.rope, mean_squares=q_squares)
        out = attend(q, self.layer.key[:, lo:hi], self.layer.value[:, lo:hi], self.bias, backend=self.backend)
        self._commit(norms, k, v, k_squares)
        return out

    def remember(self, norms: QKNorm, k: Tensor, v: Tensor) -> None:
        """Write, and commit if asked to, without attending."""
        (k_squares,) = self.ops.mean_squares((k,))
        self._write(norms, k, v, k_squares)
        self._commit(norms, k, v, k_squares)

    def _write(self, norms: QKNorm, k: Tensor, v: Tensor, k_squares: Tensor | None) -> None:
        for tokens, slots in self.cache.slots(self.plan):
            rope = RopeTable(self.rope.cos[tokens], self.rope.sin[tokens], self.rope.tokens_per_frame)
            squares = None if k_squares is None else k_squares[:, tokens]
            key = self.layer.key[:, slots]
            turn(self.ops, k[:, tokens], norms.key, norms, rope, out=key, mean_squares=squares)
            # without norm and positions it is a copy: tokens of a joined projection lie apart, and PyTorch's own copy
            # of such rows takes twice the time (H100, 2160 x 5120: 29 us against 15)
            turn(self.ops, v[:, tokens], None, norms, None, out=self.layer.value[:, slots])

    def _commit(self, norms: QKNorm, k: Tensor, v: Tensor, k_squares: Tensor | None) -> None:
        if self.plan.pass_ is Pass.COMMIT:
            raw = turn(self.ops, k, norms.key, norms, None, mean_squares=k_squares)
            self.cache.commit(self.layer, self.plan, raw, v.unflatten(-1, (-1, norms.head_dim)))


@dataclass(frozen=True)
class SequenceMemory:
    """Context and chunk in one differentiable sequence: context attends to context, the chunk to all."""

    context_tokens: int
    rope: RopeTable
    bias: Tensor | None
    ops: Elementwise
    backend: AttentionBackend

    def attend(self, norms: QKNorm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two attention calls, one a block of queries."""
        n = self.context_tokens
        q = turn(self.ops, q, norms.query, norms, self.rope)
        k = turn(self.ops, k, norms.key, norms, self.rope)
        v = v.unflatten(-1, (-1, norms.head_dim))
        if n == 0:
            return attend(q, k, v, backend=self.backend)
        context = attend(q[:, :n], k[:, :n], v[:, :n], backend=self.backend)
        return torch.cat((context, self._attend_chunk(q[:, n:], k, v)), dim=1)

    def _attend_chunk(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.bias is None:
            return attend(q, k, v, backend=self.backend)
        n, frame = self.context_tokens, self.rope.tokens_per_frame
        # the biased keys in front, as in the cache
        k, v = (torch.cat((x[:, frame:n], x[:, :frame], x[:, n:]), dim=1) for x in (k, v))
        return attend(q, k, v, KeyBias(self.bias, n - frame), backend=self.backend)

    def remember(self, norms: QKNorm, k: Tensor, v: Tensor) -> None:
        """Nothing to keep: the sequence is its own memory."""
