"""The causal Wan2.1 video transformer: context, denoising and commit passes over an explicit KV cache.

Parameter names are those of the original Wan2.1 checkpoints. The module holds weights only: what a stream
remembers lives in `KVCache` (self-attention) and `TextKV` (cross-attention), so streams can share one set
of weights.

Shapes: B batch, F latent frames, T tokens (F * rows * columns, frame-major), C dim, H heads, D head_dim.

Precision: matrix products run in the dtype of the weights. Time embedding, modulation, norms, rotary
positions, gated residual additions and the output head are computed in fp32, as Wan-Video/Wan2.1
`wan/modules/model.py` at 9737cba does; the residual stream itself is kept in the dtype of the weights, as
diffusers' WanTransformer3DModel does. Products in fp8 are put in from outside (`wanrt.models.fp8`); a layer only
asks for its input in the form that its first product reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.models.attention import (
    AttentionBackend,
    KeyBias,
    TextSpan,
    attend_text,
    choices,
    choices_for_text,
)
from wanrt.models.config import WAN_1_3B, WAN_14B, TransformerConfig
from wanrt.models.fp8 import takes_rows
from wanrt.models.kv_cache import CachePolicy, CallOrderError, KVCache, Pass, PassPlan
from wanrt.models.memory import LOCAL, CachedMemory, Elementwise, Memory, QKNorm, SequenceMemory, turn
from wanrt.models.rope import RopeTable
from wanrt_kernels.adaln import HAVE_TRITON
from wanrt_kernels.quant_rows import Rows

__all__ = [
    "WAN_1_3B",
    "WAN_14B",
    "CachePolicy",
    "CallOrderError",
    "KVCache",
    "Pass",
    "TextKV",
    "TimeEmbedding",
    "TransformerConfig",
    "WanTransformer",
]


HEAD_PARTS = 16  # of the head's inputs: 2160 tokens of 5120 take 67 us on an H100, whole 112


@dataclass(frozen=True)
class TextKV:
    """Cross-attention keys and values of one prompt (per batch entry), for every layer.

    Attributes:
        keys, values: one tensor `[B, text_len, H, D]` a layer, padding included.
        span: how much of them to attend to.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    span: TextSpan

    def layers(self) -> Iterator[LayerText]:
        """What each layer attends to."""
        for key, value in zip(self.keys, self.values, strict=True):
            yield LayerText(key, value, self.span)


@dataclass(frozen=True)
class LayerText:
    """What one layer's cross-attention attends to.

    Attributes:
        key, value: `[B, text_len, H, D]`.
        span: how much of them.
    """

    key: Tensor
    value: Tensor
    span: TextSpan


@dataclass(frozen=True)
class TimeEmbedding:
    """All that a pass needs of its timesteps: shifts, scales and gates of every layer, modulation included.

    F is 1 where all latent frames have the same timestep.

    Attributes:
        layers: `[L, B, F, 6, C]` fp32: shift, scale and gate of self-attention, then of the feed-forward.
        head: `[B, F, 2, C]` fp32: shift and scale.
    """

    layers: Tensor
    head: Tensor

    def copy_(self, other: TimeEmbedding) -> TimeEmbedding:
        """Overwrite in place, so that captured graphs see other timesteps at the old addresses."""
        with torch.no_grad():
            self.layers.copy_(other.layers)
            self.head.copy_(other.head)
        return self


@dataclass(frozen=True)
class Residual:
    """Tokens `[B, T, C]` and the last product's output, not yet added: x + update * gate.

    Attributes:
        x: `[B, T, C]`.
        update: `[B, T, C]` or None.
        gate: `[B, F, C]` fp32 or None.
    """

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None


class RMSNorm(nn.Module):
    """The weight of x / rms(x) * weight over all heads together; `Elementwise.rope_norm` applies it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Projections shared by self- and cross-attention; the attending itself is the subclass's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim, self.eps = config.head_dim, config.eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim) if config.qk_norm else None
        self.norm_k = RMSNorm(dim) if config.qk_norm else None

    def norms(self) -> QKNorm:
        """The q and k norms of this layer."""
        query, key = (None if n is None else n.weight for n in (self.norm_q, self.norm_k))
        return QKNorm(query, key, self.head_dim, self.eps)


class SelfAttention(Attention):
    """Attention of video tokens to what a `Memory` holds.

    Attributes:
        joined: q, k and v as one layer, or nothing (`wanrt.models.products`). In a tuple, because the weights in it are
            q's, k's and v's, which have their names already.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.joined: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor | Rows, memory: Memory) -> Tensor:
        """`[B, T, C]`, quantised if the projections are fp8, to `[B, T, C]`."""
        return self.o(memory.attend(self.norms(), *self._project(x)).flatten(-2))

    def _project(self, x: Tensor | Rows) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, `[B, T, C]` each; channels contiguous, tokens perhaps not."""
        if not self.joined:
            return self.q(x), self.k(x), self.v(x)
        (product,) = self.joined
        return product(x).chunk(3, dim=-1)

    def remember(self, x: Tensor | Rows, memory: Memory) -> None:
        """Only the keys and values of `[B, T, C]`."""
        memory.remember(self.norms(), self.k(x), self.v(x))


class CrossAttention(Attention):
    """Attention of video tokens to the prompt, whose keys and values are computed once by `embed`.

    Attributes:
        adds_onto: the last product adds onto the residual, in place (`wanrt.models.products`).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.adds_onto = False

    def ahead(self) -> Tensor | None:
        """`[C]`, what `forward` expects in the residual already: the bias that a product onto it leaves out."""
        # compiled, a product in place is a copy and a product
        return self.o.bias if self.adds_onto and not torch.compiler.is_compiling() else None

    def forward(self, x: Tensor, y: Tensor | Rows, text: LayerText, memory: Memory) -> Residual:
        """The residual `x` `[B, T, C]`, overwritten where `ahead` gives something; and normalised tokens y."""
        norms = self.norms()
        q = turn(memory.ops, self.q(y), norms.query, norms, None)
        attended = attend_text(q, text.key, text.value, text.span, backend=memory.backend).flatten(-2)
        if self.ahead() is None:
            return Residual(x, self.o(attended))
        x.flatten(0, 1).addmm_(attended.flatten(0, 1), self.o.weight.t())
        return Residual(x)

    def embed(self, text: Tensor, ops: Elementwise) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, text_len, H, D]` of text features `[B, text_len, C]`; differentiable."""
        norms = self.norms()
        key = turn(ops, self.k(text), norms.key, norms, None)
        return key, self.v(text).unflatten(-1, (-1, self.head_dim))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with its residual; AdaLN on first and last."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps) if config.cross_attn_norm else None
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        nn.init.normal_(self.modulation, std=dim**-0.5)

    def forward(self, residual: Residual, modulation: Tensor, text: LayerText, memory: Memory) -> Residual:
        """One layer. Every residual is added where the next norm reads it, the last one by the next layer.

        Args:
            residual: tokens, with the previous layer's update pending.
            modulation: `[B, F, 6, C]` fp32, this layer's share of a `TimeEmbedding`.
            text: the prompt's keys and values in this layer.
            memory: what self-attention attends to.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)
        x, y = self._normed(memory.ops, residual, scale, shift, self.self_attn.q)
        residual = Residual(x, self.self_attn(y, memory), gate)
        x, y = self._norm3(memory.ops, residual)
        residual = self.cross_attn(x, y, text, memory)
        x, y = self._normed(memory.ops, residual, ffn_scale, ffn_shift, self.ffn[0])
        return Residual(x, self.ffn(y), ffn_gate)

    def remember(self, residual: Residual, modulation: Tensor, memory: Memory) -> None:
        """Only this layer's keys and values: all that a pass without output needs of the last layer."""
        shift, scale, *_ = modulation.unbind(2)
        _, y = self._normed(memory.ops, residual, scale, shift, self.self_attn.q)
        self.self_attn.remember(y, memory)

    def _normed(
        self,
        ops: Elementwise,
        r: Residual,
        scale: Tensor,
        shift: Tensor,
        reader: nn.Module,
        **options: Tensor | bool,
    ) -> tuple[Tensor, Tensor | Rows]:
        """The new residual and the tokens for `reader`, quantised if it multiplies in fp8."""
        add_norm = ops.add_norm_rows if takes_rows(reader) else ops.add_norm
        return add_norm(r.x, r.update, r.gate, scale, shift, eps=self.eps, **options)

    def _norm3(self, ops: Elementwise, r: Residual) -> tuple[Tensor, Tensor | Rows]:
        if self.norm3 is None:
            x = _add(r)
            return x, x
        norm, ahead = self.norm3, self.cross_attn.ahead()
        options = {} if ahead is None else {"ahead": ahead}
        return self._normed(ops, r, norm.weight, norm.bias, self.cross_attn.q, plus_one=False, **options)


def _add(r: Residual) -> Tensor:
    """x + update * gate, rounded once."""
    assert r.update is not None
    assert r.gate is not None
    gate = r.gate.repeat_interleave(r.x.shape[1] // r.gate.shape[1], dim=1)
    return (r.x.float() + r.update.float() * gate).to(r.x.dtype)


class Head(nn.Module):
    """AdaLN and the projection to patches of velocity, in fp32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        rows, columns = config.patch_size[1:]
        self.eps = config.eps
        self.head = nn.Linear(config.dim, rows * columns * config.out_channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        nn.init.normal_(self.modulation, std=config.dim**-0.5)

    def forward(self, r: Residual, modulation: Tensor, ops: Elementwise) -> Tensor:
        """Tokens and `[B, F, 2, C]` of a `TimeEmbedding` to fp32 patches `[B, T, rows * columns * channels]`."""
        shift, scale = modulation.unbind(2)
        fp32 = torch.float32
        _, x = ops.add_norm(r.x, r.update, r.gate, scale, shift, eps=self.eps, normed_dtype=fp32)
        return linear_fp32(self.head, x) if not x.is_cuda else self._in_parts(x)

    def _in_parts(self, x: Tensor) -> Tensor:
        """`linear_fp32` with sums over inputs made in `HEAD_PARTS`: so few outputs leave most of a GPU idle else."""
        parts = math.gcd(x.shape[-1], HEAD_PARTS)
        weight = self.head.weight.float().unflatten(1, (parts, -1)).transpose(0, 1)
        sums = torch.bmm(x.flatten(0, 1).unflatten(1, (parts, -1)).transpose(0, 1), weight.transpose(1, 2))
        return (sums.sum(0) + self.head.bias.float()).unflatten(0, x.shape[:2])


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines then sines of `timesteps` `[...]` (0..1000) at dim/2 frequencies, `[..., dim]` fp32.

    Angles are made in fp64, as in Wan-Video/Wan2.1 `wan/modules/model.py` `sinusoidal_embedding_1d` at
    9737cba.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timesteps.device) / -half
    angles = timesteps.double().unsqueeze(-1) * torch.pow(10000.0, exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def linear_fp32(layer: nn.Module, x: Tensor) -> Tensor:
    """An `nn.Linear` applied in fp32 whatever the dtype of its weights."""
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.float(), layer.bias.float())


def pad_text(embeddings: Tensor, config: TransformerConfig) -> Tensor:
    """Prompt embeddings as long as the model wants them, `[B, text_len, text_dim]`.

    Args:
        embeddings: `[B, L, text_dim]`, L <= text_len, zero after the prompt's last token. Shorter ones are padded
            with zeros, and like Wan2.1 the model attends to the embedded padding.
        config: of the model.

    Raises:
        ValueError: wrong shape.
    """
    if (
        embeddings.ndim != 3
        or embeddings.shape[1] > config.text_len
        or embeddings.shape[2] != config.text_dim
    ):
        raise ValueError(
            f"text embeddings: got shape {tuple(embeddings.shape)}, "
            f"expected [B, up to {config.text_len}, {config.text_dim}]"
        )
    return F.pad(embeddings, (0, 0, 0, config.text_len - embeddings.shape[1]))


class WanTransformer(nn.Module):
    """Velocity of video latents, chunk after chunk, for any size of the Wan2.1 text-to-video family.

    Args:
        config: sizes.
        attention: what computes attention; see `wanrt.models.attention`.
    """

    def __init__(
        self, config: TransformerConfig, *, attention: AttentionBackend = AttentionBackend.AUTO
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.elementwise = LOCAL
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_channels, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def embed_text(self, embeddings: Tensor) -> TextKV:
        """Cross-attention keys and values of prompt embeddings, see `pad_text`; differentiable.

        Raises:
            ValueError: wrong shape.
        """
        padded = pad_text(embeddings, self.config).to(self.dtype)
        pairs = tuple(self._text_pairs(padded))
        return TextKV(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), TextSpan.of(padded))

    @torch.no_grad()
    def embed_text_into(self, text: TextKV, embeddings: Tensor) -> None:
        """What `embed_text` gives, in place of another prompt and at its addresses, where captured graphs read it.

        Layer by layer: two prompts' keys and values would be 0.8 GB at 14B.
        """
        padded = pad_text(embeddings, self.config).to(self.dtype)
        for key, value, pair in zip(text.keys, text.values, self._text_pairs(padded), strict=True):
            key.copy_(pair[0])
            value.copy_(pair[1])
        text.span.copy_(TextSpan.of(padded))

    def _text_pairs(self, padded: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, one layer at a time."""
        text = self.text_embedding(padded)
        for block in self._blocks():
            yield block.cross_attn.embed(text, self.elementwise)

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        """What `run` needs of timesteps `[B, F]` in 0..1000; differentiable.

        It depends on nothing else: a stream that comes back to the same few timesteps can keep it. At 14B it reads
        and converts a matrix of 157 million numbers.
        """
        time = linear_fp32(self.time_embedding[0], sinusoid(timesteps, self.config.freq_dim))
        time = linear_fp32(self.time_embedding[2], F.silu(time))
        projected = linear_fp32(self.time_projection[1], F.silu(time)).unflatten(-1, (6, -1))
        modulation = torch.stack([block.modulation.float() for block in self._blocks()])
        return TimeEmbedding(
            modulation[:, None] + projected, self.head.modulation.float() + time.unsqueeze(2)
        )

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
        """One pass: `embed_time`, `cache.begin`, `run`, `cache.finish`.

        Args:
            latents: `[B, in_channels, F, h, w]`, h and w even; noisy for DENOISE, clean otherwise.
            timesteps: `[B, F]` in 0..1000, one a latent frame; 0 for CONTEXT and COMMIT.
            text: from `embed_text`.
            cache: of this stream, allocated for this batch and (h/2, w/2).
            pass_: what the pass is for.
            bias: None, or a 0-dim tensor log(b), 0 < b <= 1, added to the scores of context tokens except
                those of context frame 0. Not for CONTEXT.

        Returns:
            DENOISE: the velocity (noise - x0) `[B, out_channels, F, h, w]` in the dtype of `latents`.
            CONTEXT and COMMIT: None, and the last layer stops at its keys and values.

        Raises:
            CallOrderError: a pass that the cache does not expect.
            ValueError: shapes that do not fit the cache, or a bias in a context pass.
        """
        self.check(latents, timesteps, cache, pass_, bias)
        plan = cache.begin(pass_, latents.shape[2])
        velocity = self.run(latents, self.embed_time(timesteps), text, cache, plan, bias)
        cache.finish(plan)
        return velocity

    @torch.no_grad()
    def run(
        self,
        latents: Tensor,
        time: TimeEmbedding,
        text: TextKV,
        cache: KVCache,
        plan: PassPlan,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """`forward` without checks and without the cache's book-keeping: tensor work only, fixed by `plan`.

        This is what a CUDA graph captures: static shapes and addresses, no host sync. After a replay call
        `cache.finish(plan)`.
        """
        key_bias = None if bias is None else KeyBias(bias, cache.biased_keys(plan))
        rope = cache.rope.slice_frames(plan.context, plan.frames)
        ops = self.elementwise
        memories = [
            CachedMemory(cache, layer, plan, rope, key_bias, self.attention, ops) for layer in cache.layers
        ]
        residual = Residual(self._patchify(latents))
        *layers, last = zip(self._blocks(), time.layers.unbind(), text.layers(), memories, strict=True)
        for block, modulation, prompt, memory in layers:
            residual = block(residual, modulation, prompt, memory)
        block, modulation, prompt, memory = last
        if plan.pass_ is not Pass.DENOISE:
            block.remember(residual, modulation, memory)
            return None
        residual = block(residual, modulation, prompt, memory)
        return self._unpatchify(self.head(residual, time.head, ops), latents)

    def forward_train(
        self,
        context: Tensor | None,
        context_t: Tensor | None,
        latents: Tensor,
        t: Tensor,
        text: TextKV,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Velocity of a chunk given its context in one differentiable pass, equal to CONTEXT then DENOISE.

        Args:
            context: clean context `[B, in_channels, Fc, h, w]`, or None for a first chunk.
            context_t: `[B, Fc]`, or None with `context`.
            latents: noisy chunk `[B, in_channels, F, h, w]`.
            t: `[B, F]` in 0..1000.
            text: from `embed_text`.
            bias: as in `forward`.

        Returns:
            `[B, out_channels, F, h, w]`, velocity of the chunk.
        """
        frames, count = latents, 0
        if context is not None and context_t is not None:
            count = context.shape[2]
            frames, t = torch.cat((context, latents), dim=2), torch.cat((context_t, t), dim=1)
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        rope = RopeTable.build(self.config.head_dim, frames.shape[2], grid, device=latents.device)
        memory = SequenceMemory(
            count * rope.tokens_per_frame,
            rope,
            bias if count > 1 else None,
            self.elementwise,
            AttentionBackend.SDPA,
        )
        time = self.embed_time(t)
        residual = Residual(self._patchify(frames))
        for block, modulation, prompt in zip(
            self._blocks(), time.layers.unbind(), text.layers(), strict=True
        ):
            residual = block(residual, modulation, prompt, memory)
        patches = self.head(residual, time.head, memory.ops)[:, memory.context_tokens :]
        return self._unpatchify(patches, latents)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the residual stream."""
        return self.patch_embedding.weight.dtype

    def paths(self) -> str:
        """In one line, for the log: what computes attention and what runs between the products, and why."""
        device, head_dim = self.patch_embedding.weight.device, self.config.head_dim
        plain, biased = (
            choices(self.attention, device, self.dtype, head_dim, biased=biased) for biased in (False, True)
        )
        backends = " or ".join(dict.fromkeys(plain + biased))
        prompt = " or ".join(
            f"{backend} ({'one key for its padding' if backend.is_own else 'all of its padding'})"
            for backend in choices_for_text(self.attention, device, self.dtype, head_dim)
        )
        reason = "chosen" if self.attention is AttentionBackend.AUTO else "forced"
        bias = " or ".join(dict.fromkeys(backend.bias_by for backend in biased))
        where = f"{device.type}, {str(self.dtype).removeprefix('torch.')}, heads of {head_dim}"
        kernels = "Triton kernels" if device.type == "cuda" and HAVE_TRITON else "plain PyTorch"
        missing = "" if HAVE_TRITON or device.type != "cuda" else " (Triton is not installed)"
        return (
            f"transformer: attention by {backends} ({reason} for {where}), KV bias by {bias}, "
            f"to the prompt by {prompt}; {kernels} between products{missing}"
        )

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def check(
        self, latents: Tensor, timesteps: Tensor, cache: KVCache, pass_: Pass, bias: Tensor | None
    ) -> None:
        """Raise the ValueErrors of `forward`."""
        batch, grid = cache.layers[0].key.shape[0], cache.grid
        rows, columns = self.config.patch_size[1:]
        expected = (batch, self.config.in_channels, latents.shape[2], grid[0] * rows, grid[1] * columns)
        if latents.shape != expected or timesteps.shape != (batch, latents.shape[2]):
            raise ValueError(
                f"transformer: got latents {tuple(latents.shape)} and timesteps {tuple(timesteps.shape)}, "
                f"expected {expected} and {(batch, latents.shape[2])}, the cache's batch and grid"
            )
        if bias is not None and (pass_ is Pass.CONTEXT or bias.ndim):
            raise ValueError(
                f"transformer: got a bias of shape {tuple(bias.shape)} in a {pass_} pass, "
                f"expected None or a 0-dim tensor in a denoise or commit pass"
            )

    def _patchify(self, latents: Tensor) -> Tensor:
        """`[B, channels, F, h, w]` to tokens `[B, T, C]`; kernel is stride: a convolution is a product."""
        _, p, q = self.config.patch_size
        patches = latents.to(self.dtype).unflatten(4, (-1, q)).unflatten(3, (-1, p))
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, patches: Tensor, like: Tensor) -> Tensor:
        """`[B, T, rows * columns * channels]` to `[B, channels, F, h, w]` in the dtype of `like`."""
        _, p, q = self.config.patch_size
        h, w = like.shape[-2] // p, like.shape[-1] // q
        x = patches.unflatten(2, (p, q, -1)).unflatten(1, (-1, h, w))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).to(like.dtype)
