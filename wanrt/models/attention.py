"""Attention of video tokens, with an optional scalar bias on a leading run of keys.

Shapes: B batch, T tokens, H heads, D head_dim. Queries `[B, Tq, H, D]`, keys and values `[B, Tk, H, D]`;
the views that scaled_dot_product_attention wants are made here without copies.

The cache keeps the biased keys in front of all others (see `kv_cache.py`), so that the biased and the
unbiased keys are one contiguous range each and two plain attention calls can be merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionBackend(StrEnum):
    """How a pass computes attention. AUTO: see `choose`."""

    AUTO = "auto"
    MASK = "mask"  # one call, the bias as an additive mask over keys
    MERGE = "merge"  # two plain calls, merged by log-sum-exp


@dataclass(frozen=True)
class KeyBias:
    """A number added to the scores of the first `keys` keys.

    Attributes:
        value: 0-dim fp32 tensor, log(b) with 0 < b <= 1. It is read on the device only: changing it in place
            neither recompiles nor re-captures.
        keys: how many leading keys it applies to; a Python int, fixed per shape.
    """

    value: Tensor
    keys: int


def choose(backend: AttentionBackend, device: torch.device) -> AttentionBackend:
    """Resolve AUTO: two merged flash calls on CUDA, where a mask forces a slow kernel; one masked call
    elsewhere.
    """
    if backend is not AttentionBackend.AUTO:
        return backend
    return AttentionBackend.MERGE if device.type == "cuda" else AttentionBackend.MASK


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: KeyBias | None = None,
    *,
    backend: AttentionBackend = AttentionBackend.AUTO,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over all keys given; nothing is padded.

    Args:
        q: `[B, Tq, H, D]`.
        k, v: `[B, Tk, H, D]`, same dtype as `q`; strided views are fine.
        bias: None, or what to add to the leading keys' scores.
        backend: how to apply the bias; without a bias every backend is one plain call.

    Returns:
        `[B, Tq, H, D]` in the dtype of `q`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is None or bias.keys == 0:
        out = F.scaled_dot_product_attention(q, k, v)
    elif choose(backend, q.device) is AttentionBackend.MASK:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_key_mask(bias, q, k))
    else:
        out = _attend_merged(q, k, v, bias)
    return out.transpose(1, 2)


def _key_mask(bias: KeyBias, q: Tensor, k: Tensor) -> Tensor:
    """`[1, 1, 1, Tk]` additive mask, the same for every query; expanded by the callee without a copy."""
    leading = bias.value.to(q.dtype).expand(bias.keys)
    rest = leading.new_zeros(k.shape[2] - bias.keys)
    return torch.cat((leading, rest))[None, None, None]


def _attend_merged(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias) -> Tensor:
    """Biased and unbiased keys apart, then the convex combination that their log-sum-exps give."""
    n = bias.keys
    biased, biased_lse = _attend_lse(q, k[:, :, :n], v[:, :, :n])
    plain, plain_lse = _attend_lse(q, k[:, :, n:], v[:, :, n:])
    # softmax over two parts: the weight of a part is exp(its lse) over the sum of both
    share = torch.sigmoid(biased_lse + bias.value - plain_lse)[..., None]
    return torch.lerp(plain.float(), biased.float(), share).to(q.dtype)


def _attend_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Plain attention `[B, H, Tq, D]` and the fp32 log-sum-exp `[B, H, Tq]` of its scores."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, lse.reshape(q.shape[:3])
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse
