"""Attention of video tokens, with an optional scalar bias on a leading run of keys.

Shapes: B batch, T tokens, H heads, D head_dim. Queries `[B, Tq, H, D]`, keys and values `[B, Tk, H, D]`;
the views that scaled_dot_product_attention wants are made here without copies.

The cache keeps the biased keys in front of all others (see `kv_cache.py`), so that the biased and the
unbiased keys are one contiguous range each and two plain attention calls can be merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt_kernels.merge import merge

Pair = tuple[Tensor, Tensor]  # attention and its log-sum-exp
Call = Callable[[], Pair]


class AttentionBackend(StrEnum):
    """Who computes attention. With a KV bias, all but SDPA make two plain calls and merge them."""

    AUTO = "auto"  # by `choose`
    SDPA = "sdpa"  # torch decides; the bias is an additive mask over keys
    CUDNN = "cudnn"
    FLASH = "flash"  # FlashAttention-2 inside torch
    MATH = "math"  # products and softmax written out, scores in fp32


# By CUDA compute capability (major); half precisions with head_dim <= 128. H200, 40 heads, 2160 queries: cuDNN
# 0.37 ms, flash 0.67 ms. Capabilities not listed take FLASH, which every GPU since Ampere has.
CUDA_DEFAULTS = {9: AttentionBackend.CUDNN, 10: AttentionBackend.CUDNN}


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


def choose(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """Resolve AUTO for a device, dtype and head size; anything else is what it is."""
    if backend is not AttentionBackend.AUTO:
        return backend
    if device.type != "cuda" or dtype is torch.float32 or head_dim > 128 or head_dim % 8:
        return AttentionBackend.SDPA
    major = torch.cuda.get_device_properties(device).major
    return CUDA_DEFAULTS.get(major, AttentionBackend.FLASH)


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
    backend = choose(backend, q.device, q.dtype, q.shape[-1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is AttentionBackend.SDPA:
        mask = None if bias is None or bias.keys == 0 else _key_mask(bias, q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    if bias is None or bias.keys == 0:
        return _attend_lse(q, k, v, backend)[0].transpose(1, 2)
    return _attend_merged(q, k, v, bias, backend)


def _key_mask(bias: KeyBias, q: Tensor, k: Tensor) -> Tensor:
    """`[1, 1, 1, Tk]` additive mask, the same for every query; expanded by the callee without a copy."""
    leading = bias.value.to(q.dtype).expand(bias.keys)
    rest = leading.new_zeros(k.shape[2] - bias.keys)
    return torch.cat((leading, rest))[None, None, None]


def _attend_merged(q: Tensor, k: Tensor, v: Tensor, bias: KeyBias, backend: AttentionBackend) -> Tensor:
    """Biased and unbiased keys apart, then the average of both that their log-sum-exps and the bias give."""
    n = bias.keys
    (plain, plain_lse), (biased, biased_lse) = _side_by_side(
        lambda: _attend_lse(q, k[:, :, n:], v[:, :, n:], backend),
        lambda: _attend_lse(q, k[:, :, :n], v[:, :, :n], backend),
        q.device,
    )
    return merge(biased.transpose(1, 2), biased_lse, plain.transpose(1, 2), plain_lse, bias.value)


def _side_by_side(first: Call, second: Call, device: torch.device) -> tuple[Pair, Pair]:
    """Both results. On CUDA the two run at once: each fills the multiprocessors that the other's last wave leaves idle.

    H100, 40 heads, 2160 queries, 4320 keys of which 1440 biased: one call without bias 0.359 ms, two and the merge one
    after the other 0.409, side by side 0.376.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return first(), second()
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        aside = second()
    result = first()
    # The memory of `aside` needs no further care: nothing is ever done on the side stream that does not wait for the
    # main one first.
    main.wait_stream(side)
    return result, aside


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # as urgent as the pipeline's own lane: the display's work must not get in between
    return torch.cuda.Stream(device, priority=-1)


def _attend_lse(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
    """Plain attention `[B, H, Tq, D]` and the fp32 log-sum-exp `[B, H, Tq]` of its scores."""
    if backend is AttentionBackend.CUDNN:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, lse.reshape(q.shape[:3])
    if backend is AttentionBackend.FLASH:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse.reshape(q.shape[:3])
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse
