"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509) around an untouched transformer.

Every rank holds all weights and 1/N of the tokens of every latent frame. Only self-attention needs more: shares of
tokens become shares of heads and back, so each rank's KV cache holds all tokens of its heads. Where ranks reach each
other's memory, queries, keys, values and outputs are stored at their places by the kernels that make them
(`PeerMemory`), elsewhere two all-to-alls move them (`UlyssesMemory`).

A share of tokens is made to look like a smaller video: its patches in one row, a "latent" of p x (m q) per frame.
The model never looks at positions itself (the cache's RoPE table does), so it needs no word of all this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanrt.models.attention import AttentionBackend, KeyBias, attend, choose
from wanrt.models.kv_cache import KVCache, Pass, PassPlan
from wanrt.models.memory import CachedMemory, Elementwise, Memory, QKNorm, turn
from wanrt.models.rope import RopeTable
from wanrt.models.transformer import SelfAttention, TextKV, TimeEmbedding, WanTransformer
from wanrt.parallel.collectives import gather, heads_to_tokens, tokens_to_heads
from wanrt.parallel.peers import Peers, SharedBuffers
from wanrt_kernels.hopper_attention import hopper_attention_to
from wanrt_kernels.peer_heads import OwnTokens, scatter_heads, scatter_tokens
from wanrt_kernels.quant_rows import Rows
from wanrt_kernels.shared import Shared


def own_rows(rope: RopeTable, rank: int, size: int) -> RopeTable:
    """The table's rows of rank `rank`'s tokens: the rank-th part of every latent frame."""
    part = rope.tokens_per_frame // size

    def cut(table: Tensor) -> Tensor:
        frames = table.unflatten(0, (-1, rope.tokens_per_frame))
        return frames[:, rank * part : (rank + 1) * part].flatten(0, 1)

    return RopeTable(cut(rope.cos), cut(rope.sin), part)


@dataclass(frozen=True)
class _RankMemory:
    """What a rank's tokens see of a layer's memory."""

    whole: CachedMemory

    @property
    def ops(self) -> Elementwise:
        """What runs between matrix products."""
        return self.whole.ops

    @property
    def backend(self) -> AttentionBackend:
        """What computes attention."""
        return self.whole.backend


@dataclass(frozen=True)
class UlyssesMemory(_RankMemory):
    """A layer's memory seen from a rank's tokens; keys and values are stored for all tokens of its heads.

    Norm, rotation and rounding come before the exchange, as in one process, so the same numbers are exchanged.
    """

    group: ProcessGroup

    def attend(self, norms: QKNorm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `CachedMemory.attend`, for `[B, F * m, C]` of this rank's tokens; gives `[B, F * m, H, D]`."""
        memory, plan = self.whole, self.whole.plan
        query = turn(self.ops, q, norms.query, norms, self._own_rope())
        mine = torch.stack((query, *self._key_value(norms, k, v)))
        query, key, value = tokens_to_heads(mine, plan.frames, self.group)
        memory.cache.write(memory.layer, plan, key, value)
        lo, hi = memory.cache.span(plan)
        keys, values = memory.layer.key[:, lo:hi], memory.layer.value[:, lo:hi]
        out = attend(query, keys, values, memory.bias, backend=memory.backend)
        self._commit(norms, k, value)
        return heads_to_tokens(out, plan.frames, self.group)

    def remember(self, norms: QKNorm, k: Tensor, v: Tensor) -> None:
        """As `CachedMemory.remember`."""
        memory, plan = self.whole, self.whole.plan
        key, value = tokens_to_heads(torch.stack(self._key_value(norms, k, v)), plan.frames, self.group)
        memory.cache.write(memory.layer, plan, key, value)
        self._commit(norms, k, value)

    def _key_value(self, norms: QKNorm, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        key = turn(self.ops, k, norms.key, norms, self._own_rope())
        return key, v.unflatten(-1, (-1, norms.head_dim))

    def _own_rope(self) -> RopeTable:
        return own_rows(self.whole.rope, self.group.rank(), self.group.size())

    def _commit(self, norms: QKNorm, k: Tensor, value: Tensor) -> None:
        memory, plan = self.whole, self.whole.plan
        if plan.pass_ is Pass.COMMIT:
            raw = tokens_to_heads(turn(self.ops, k, norms.key, norms, None), plan.frames, self.group)
            memory.cache.commit(memory.layer, plan, raw, value)


def attend_into(
    addresses: Tensor,
    own: OwnTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: KeyBias | None,
    backend: AttentionBackend,
) -> None:
    """`attend` with this rank's heads, each token's result stored on the rank that has it.

    addresses: int64 `[size]`, of `[1, F * m, H, D]` on every rank; own: which tokens this rank has. wanrt's own kernel
    for Hopper stores there itself.
    """
    _, queries, heads, head_dim = q.shape
    biased = bias is not None and bias.keys > 0
    chosen = choose(backend, q.device, q.dtype, head_dim, rows=queries * heads, biased=biased)
    if chosen is AttentionBackend.HOPPER:
        value, keys = (None, 0) if bias is None else (bias.value, bias.keys)
        hopper_attention_to(q, k, v, value, keys, addresses, own)
    else:
        scatter_tokens(attend(q, k, v, bias, backend=chosen)[0], addresses, own)


@dataclass(frozen=True)
class PeerMemory(_RankMemory):
    """As `UlyssesMemory`, for ranks that store in each other's memory; the cache's buffers must be `Peers.empty`'s.

    Two barriers a layer keep every store clear of every reader. Behind the first all ranks have stored what this layer
    attends to; a rank comes to it having read the last layer's outputs, so they may be overwritten behind it. Behind
    the second all have stored outputs; a rank comes to it having attended, and committed, so that queries, raw keys
    and the cache may be overwritten behind it. The last layer of a pass without output has no second one: what it
    reads behind the first it alone wrote, and the next pass has a first one before it gets there.
    """

    peers: Peers
    buffers: SharedBuffers

    def attend(self, norms: QKNorm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `UlyssesMemory.attend`, for a batch of 1. The result is overwritten by the next layer."""
        memory, own = self.whole, self._own()
        query = self._take("queries", norms.head_dim, q)
        self._scatter(norms, q, norms.query, memory.rope, query.addresses, own)
        raw = self._store(norms, k, v)
        self.peers.barrier()
        lo, hi = memory.cache.span(memory.plan)
        keys, values = memory.layer.key[:, lo:hi], memory.layer.value[:, lo:hi]
        heads = (q.shape[2] // norms.head_dim, norms.head_dim)
        tokens = self.buffers.take("outputs", (*q.shape[:2], *heads), q.dtype)
        attend_into(tokens.addresses, own, query.here, keys, values, memory.bias, memory.backend)
        self._commit(raw)
        self.peers.barrier()
        return tokens.here

    def remember(self, norms: QKNorm, k: Tensor, v: Tensor) -> None:
        """As `CachedMemory.remember`."""
        raw = self._store(norms, k, v)
        self.peers.barrier()
        self._commit(raw)

    def _store(self, norms: QKNorm, k: Tensor, v: Tensor) -> Tensor | None:
        """Keys and values into every rank's cache; for a commit also the keys before rotation, which it gives."""
        memory, own = self.whole, self._own()
        first, turn = memory.cache.frame_slots(memory.plan)
        slots = replace(own, first=first, turn=turn)
        keys, values = (self.peers.addresses(part) for part in (memory.layer.key, memory.layer.value))
        self._scatter(norms, k, norms.key, memory.rope, keys, slots)
        self._scatter(norms, v, None, None, values, slots)
        if memory.plan.pass_ is not Pass.COMMIT:
            return None
        raw = self._take("raw keys", norms.head_dim, k)
        self._scatter(norms, k, norms.key, None, raw.addresses, own)
        return raw.here

    def _commit(self, raw: Tensor | None) -> None:
        if raw is not None:
            memory = self.whole
            ((_, chunk),) = memory.cache.slots(memory.plan)
            memory.cache.commit(memory.layer, memory.plan, raw, memory.layer.value[:, chunk])

    def _own(self) -> OwnTokens:
        ranks = self.peers.size
        return OwnTokens(
            self.peers.rank, ranks, self.whole.plan.frames, self.whole.rope.tokens_per_frame // ranks
        )

    def _take(self, name: str, head_dim: int, x: Tensor) -> Shared:
        """Room for all tokens of this rank's heads, `[1, F * N * m, H / N, D]`."""
        ranks = self.peers.size
        shape = (1, x.shape[1] * ranks, x.shape[2] // head_dim // ranks, head_dim)
        return self.buffers.take(name, shape, x.dtype)

    def _scatter(
        self,
        norms: QKNorm,
        x: Tensor,
        weight: Tensor | None,
        rope: RopeTable | None,
        to: Tensor,
        own: OwnTokens,
    ) -> None:
        cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
        scatter_heads(x, weight, cos, sin, to, own, head_dim=norms.head_dim, eps=norms.eps)


class UlyssesAttention(SelfAttention):
    """The self-attention it is made from, with its memory reached through the group.

    reach: a `CachedMemory` of whole tokens as this rank's tokens see it.
    """

    def __init__(self, whole: SelfAttention, reach: Callable[[CachedMemory], Memory]) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.eps = whole.head_dim, whole.eps
        self.q, self.k, self.v, self.o = whole.q, whole.k, whole.v, whole.o
        self.norm_q, self.norm_k, self.joined = whole.norm_q, whole.norm_k, whole.joined
        self.reach = reach

    def forward(self, x: Tensor | Rows, memory: Memory) -> Tensor:
        """`[B, F * m, C]` to `[B, F * m, C]`."""
        return super().forward(x, self._shared(memory))

    def remember(self, x: Tensor | Rows, memory: Memory) -> None:
        """Keys and values only."""
        super().remember(x, self._shared(memory))

    def _shared(self, memory: Memory) -> Memory:
        assert isinstance(memory, CachedMemory), "Ulysses is for inference: it needs a KV cache"
        return self.reach(memory)


@dataclass(frozen=True)
class TokenShare:
    """Cuts latents into a rank's share of every frame's patches, and joins the shares again.

    patch: (rows, columns) of a patch. Shapes: `[B, C, F, h, w]` whole, `[B, C, F, p, m q]` a share.
    """

    patch: tuple[int, int]
    group: ProcessGroup

    def cut(self, latents: Tensor) -> Tensor:
        """This rank's patches, in one row."""
        p, q = self.patch
        patches = latents.unflatten(4, (-1, q)).unflatten(3, (-1, p)).transpose(4, 5).flatten(3, 4)
        part = patches.shape[3] // self.group.size()
        mine = patches[:, :, :, self.group.rank() * part :][:, :, :, :part]
        return mine.transpose(3, 4).flatten(4)

    def join(self, share: Tensor, height: int) -> Tensor:
        """Every rank's share as one latent of `height` rows, on every rank."""
        p, q = self.patch
        patches = gather(share.unflatten(4, (-1, q)).transpose(3, 4), 3, self.group)
        return patches.unflatten(3, (height // p, -1)).transpose(4, 5).flatten(5, 6).flatten(3, 4)


class UlyssesTransformer(nn.Module):
    """A `WanTransformer` whose layers were given to `UlyssesAttention`; called like the model itself.

    Every rank is called with the whole latents, and gets the whole velocity.
    """

    def __init__(self, model: WanTransformer, group: ProcessGroup) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.share = TokenShare(model.config.patch_size[1:], group)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    def embed_text(self, embeddings: Tensor) -> TextKV:
        """See `WanTransformer.embed_text`; whole on every rank, as cross-attention is local."""
        return self.model.embed_text(embeddings)

    def embed_text_into(self, text: TextKV, embeddings: Tensor) -> None:
        """See `WanTransformer.embed_text_into`."""
        self.model.embed_text_into(text, embeddings)

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        """See `WanTransformer.embed_time`; whole on every rank, as it speaks of frames."""
        return self.model.embed_time(timesteps)

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextKV,
        cache: KVCache,
        *,
        pass_: Pass,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """See `WanTransformer.forward`."""
        self.model.check(latents, timesteps, cache, pass_, bias)
        plan = cache.begin(pass_, latents.shape[2])
        velocity = self.run(latents, self.embed_time(timesteps), text, cache, plan, bias)
        cache.finish(plan)
        return velocity

    def run(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: TextKV,
        cache: KVCache,
        plan: PassPlan,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """See `WanTransformer.run`."""
        share = self.model.run(self.share.cut(latents), time, text, cache, plan, bias)
        return None if share is None else self.share.join(share, latents.shape[3])
