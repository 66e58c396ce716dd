"""The UMT5 text encoder (T5 encoder with a relative position bias in every layer), any size.

Architecture: Xue et al., "mT5" (2021); Chung et al., "UniMax" (2023) for UMT5; bias buckets from Raffel et
al., "Exploring the Limits of Transfer Learning" (2020). Parameter names, eps, mask and precision rules follow
Wan-Video/Wan2.1 `wan/modules/t5.py` at 9737cba, so that its checkpoint loads as it is.

Shapes: B prompts, L tokens, D model width, N heads, C width of a head.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wanrt.models.transfer import send

if TYPE_CHECKING:
    from wanrt.models.tokenizer import PromptTokenizer

logger = logging.getLogger("wanrt.models")

# Distances beyond this share the last bucket: `max_dist` of Wan2.1 `T5RelativeEmbedding`, as in every T5.
MAX_DISTANCE = 128
# fp16 activations that overflow are pulled back to this far below the largest value (Wan2.1 `fp16_clamp`).
FP16_MARGIN = 1000.0


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a UMT5 encoder; the defaults are UMT5-XXL (Wan2.1 `umt5_xxl`)."""

    vocab: int = 256384
    dim: int = 4096
    attn_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.attn_dim % self.num_heads:
            raise ValueError(f"attn_dim {self.attn_dim} is not divisible by num_heads {self.num_heads}")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"num_buckets is {self.num_buckets}; expected a multiple of 4")


class T5Norm(nn.Module):
    """RMS norm without mean or bias; the mean square is taken in fp32, the product in the weight's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class T5Attention(nn.Module):
    """Self-attention without 1/sqrt(C) scaling (T5 folds it into the weights); softmax in fp32."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.attn_dim, bias=False)
        self.k = nn.Linear(config.dim, config.attn_dim, bias=False)
        self.v = nn.Linear(config.dim, config.attn_dim, bias=False)
        self.o = nn.Linear(config.attn_dim, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], bias [B, N, L, L] added to the scores -> [B, L, D]."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) + bias
        weights = scores.float().softmax(dim=-1).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, L, C]


class T5FeedForward(nn.Module):
    """Gated feed-forward: fc2(fc1(x) * gelu_tanh(gate(x)))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim, bias=False), nn.GELU(approximate="tanh")
        )
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        return self.fc2(self.fc1(x) * self.gate(x))


class T5RelativeEmbedding(nn.Module):
    """The learned score bias of each (bucket, head)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """buckets [L, L] int64 -> bias [1, N, L, L]."""
        return self.embedding(buckets).permute(2, 0, 1).unsqueeze(0)


class T5Block(nn.Module):
    """One encoder layer: attention with this layer's own position bias, then the feed-forward."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = T5Norm(config.dim, config.eps)
        self.attn = T5Attention(config)
        self.norm2 = T5Norm(config.dim, config.eps)
        self.ffn = T5FeedForward(config)
        self.pos_embedding = T5RelativeEmbedding(config)

    def forward(self, x: Tensor, buckets: Tensor, keep: Tensor) -> Tensor:
        """x [B, L, D], buckets [L, L], keep [B, 1, 1, L] bool (False: never attended) -> [B, L, D]."""
        bias = self.pos_embedding(buckets).masked_fill(~keep, torch.finfo(x.dtype).min)
        x = clamp_fp16(x + self.attn(self.norm1(x), bias))
        return clamp_fp16(x + self.ffn(self.norm2(x)))


class UMT5Encoder(nn.Module):
    """UMT5 encoder with the parameter names of Wan2.1's `models_t5_umt5-xxl-enc-bf16.pth`.

    Weights start as T5's initialisation, ready for training (there is no dropout). Build on the meta device
    to load a checkpoint.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = T5Norm(config.dim, config.eps)
        self.reset_parameters()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids [B, L] (integers below `vocab`) under mask [B, L] (non-zero on tokens) -> [B, L, dim].

        Rows of padding hold values of no meaning; `encode_prompts` zeroes them.
        """
        buckets = relative_position_buckets(ids.shape[1], self.config.num_buckets, ids.device)
        keep = (mask != 0)[:, None, None, :]
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, keep)
        return self.norm(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights (Wan2.1 `init_weights`: T5's Adafactor-style scales)."""
        c = self.config
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        for block in self.blocks:
            assert isinstance(block, T5Block)
            nn.init.normal_(block.attn.q.weight, std=(c.dim * c.attn_dim) ** -0.5)
            nn.init.normal_(block.attn.k.weight, std=c.dim**-0.5)
            nn.init.normal_(block.attn.v.weight, std=c.dim**-0.5)
            nn.init.normal_(block.attn.o.weight, std=(c.num_heads * c.attn_dim) ** -0.5)
            nn.init.normal_(block.ffn.gate[0].weight, std=c.dim**-0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.ffn.fc1.weight, std=c.dim**-0.5)
            nn.init.normal_(block.ffn.fc2.weight, std=c.ffn_dim**-0.5)
            nn.init.normal_(
                block.pos_embedding.embedding.weight, std=(2 * c.num_buckets * c.num_heads) ** -0.5
            )


def relative_position_buckets(length: int, num_buckets: int, device: torch.device) -> Tensor:
    """Bucket of key j seen from query i, [length, length] int64 in 0..num_buckets-1.

    Half of the buckets serve keys behind the query. Of each half, the nearer half holds one distance each,
    the rest grows with the logarithm up to MAX_DISTANCE (Raffel et al. 2020, section 2.1).
    """
    positions = torch.arange(length, device=device)
    offset = positions[None, :] - positions[:, None]
    distance = offset.abs()
    half, exact = num_buckets // 2, num_buckets // 4
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + (offset > 0).long() * half


def clamp_fp16(x: Tensor) -> Tensor:
    """Pull an fp16 tensor that overflowed back into range; other dtypes pass through.

    The limit moves only when an infinity is present, as in Wan2.1, but is chosen on the device: no host sync.
    """
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(torch.float16).max
    limit = largest - FP16_MARGIN * x.isinf().any().to(x.dtype)
    return torch.clamp(x, min=-limit, max=limit)


@torch.no_grad()
def encode_prompts(encoder: UMT5Encoder, tokenizer: PromptTokenizer, prompts: list[str]) -> Tensor:
    """Encode prompts -> [B, text_len, dim] in the encoder's dtype and device, zero after each `</s>`.

    A prompt over the token limit is cut and logged as a warning.
    """
    ids, mask, truncated = tokenizer(prompts)
    for prompt, cut in zip(prompts, truncated, strict=True):
        if cut:
            logger.warning("prompt cut at %d tokens: %.60s...", tokenizer.text_len, prompt)
    device = encoder.token_embedding.weight.device
    ids, mask = send(ids, device), send(mask, device)
    # Not a product: a padding row may hold inf or nan in fp16, and 0 * nan is nan.
    return encoder(ids, mask).masked_fill(mask[..., None] == 0, 0.0)
