"""Attention with a scalar bias on the leading keys, in one kernel: no mask over keys and no second call to merge.

One program holds a tile of queries and goes over all keys with the online softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867; Dao 2023, arXiv:2307.08691), sums in fp32. Attention does not care for the order of keys, so they are
taken in blocks that are biased throughout or not at all: the bias of such a block is one number, and goes into the
maximum that each row subtracts anyway. What is left at the end of the biased keys and of the others shares the last
block, the only one that looks at keys one by one.

Or with a bias on the last key alone, of a number of keys that is read on the device: a padded text's. Its padding is
one key and one value many times over, and m equal keys weigh as much as one with log(m) added to its score.

Shapes: B batch, Tq queries, Tk keys, H heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton; `attention_ref` serves there
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD, HEAD_STEP = 128, 16  # a product's inner axis is a multiple of 16; wider heads than 128 spill


@dataclass(frozen=True)
class AttentionConfig:
    """Launch shape: queries and keys of a tile, warps, and how many blocks of keys are on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int

    @classmethod
    def choose(cls, head_dim: int, dtype: torch.dtype, capability: int) -> AttentionConfig:
        """For heads of `head_dim` on a device of this compute capability (major); see `CONFIGS`."""
        if dtype is torch.float32:
            return FP32
        wide = head_dim > 64
        return CONFIGS.get((capability, wide), CONFIGS[8, wide])


# By compute capability (major) and whether heads are wider than 64; half precisions. Others take the rows of 8, whose
# blocks fit the 99 KiB of shared memory that every later device has.
CONFIGS = {
    # One warp group of 64 queries, the least a wgmma takes; queries 16 KiB, and 32 KiB a stage. On an H100 9 to 23 %
    # faster than 128x128 with 8 warps at 2160 queries and 4320 keys; with 40 heads at 4680 and 9360, 2.040 ms against
    # 2.010 with a bias and 2.065 against 1.894 without.
    (9, True): AttentionConfig(queries=64, keys=64, warps=4, stages=3),
    # Two warp groups; queries 16 KiB, and 32 KiB a stage.
    (9, False): AttentionConfig(queries=128, keys=128, warps=8, stages=3),
    # Queries stay in registers: the largest tiles that do not spill, in 64 and 40 KiB.
    (8, True): AttentionConfig(queries=128, keys=32, warps=8, stages=3),
    (8, False): AttentionConfig(queries=64, keys=64, warps=4, stages=3),
}
# Exact products run on the plain cores, out of registers: with larger tiles, or fewer warps, they spill more.
FP32 = AttentionConfig(queries=32, keys=32, warps=8, stages=1)


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    keys: int = 0,
    count: Tensor | None = None,
    last_bias: Tensor | None = None,
) -> Tensor:
    """Compute what `attention` computes, in plain PyTorch with all scores in fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if bias is not None:
        scores = torch.cat((scores[..., :keys] + bias.float(), scores[..., keys:]), dim=-1)
    if count is not None and last_bias is not None:
        scores = scores + _count_mask(count, last_bias, k.shape[2])[:, None, None]
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).contiguous()


def _count_mask(count: Tensor, last_bias: Tensor, keys: int) -> Tensor:
    """[B, Tk]: 0, then `last_bias` for the last of `count` keys, then -inf."""
    behind = torch.arange(keys, device=count.device) - (count[:, None] - 1)  # how far behind the last key
    return torch.where(behind == 0, last_bias.float()[:, None], 0.0).masked_fill(behind > 0, -math.inf)


if triton is not None:

    @triton.jit
    def _rows(ptr, token, mask, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """Rows `token` of one head, [tokens, BLOCK_D]; zeros beyond D and, unless `mask` is None, where it is false."""
        channel = tl.arange(0, BLOCK_D)
        at = ptr + token[:, None] * stride + channel[None, :]
        if mask is not None:
            return tl.load(at, mask[:, None] & (channel < D)[None, :], 0.0)
        elif D == BLOCK_D:  # noqa: RET505 (Triton compiles what follows a return that is taken)
            return tl.load(at)
        else:
            return tl.load(at, (channel < D)[None, :], 0.0)

    @triton.jit
    def _absorb(sums, weight, top, scores, v, bias, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        """A block of keys into the running softmax: `scores` * SCALE + `bias` are the exponents, to base 2.

        sums: [queries, BLOCK_D], sum of values, each 2^(exponent - top); weight: [queries], of the same powers.
        top: [queries], the largest exponent so far.
        """
        larger = tl.maximum(top, tl.max(scores, axis=1) * SCALE + bias)
        shrink = tl.exp2(top - larger)
        powers = tl.exp2(scores * SCALE - (larger - bias)[:, None])
        weight = weight * shrink + tl.sum(powers, axis=1)
        sums = tl.dot(powers.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
        return sums, weight, larger

    @triton.jit
    def _attention_kernel(
        q_ptr, k_ptr, v_ptr, bias_ptr, count_ptr, last_bias_ptr, out_ptr, heads, queries, keys, biased,
        q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
        SCALE: tl.constexpr,  # log2(e) / sqrt(D); as an argument, torch.compile would make it, and all it meets, fp64
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        BIASED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
        q_ptr += batch * q_batch + head * q_head
        k_ptr += batch * k_batch + head * k_head
        v_ptr += batch * v_batch + head * v_head
        query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q = _rows(q_ptr, query.to(tl.int64), query < queries, q_token, D, BLOCK_D)
        sums = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        weight = tl.zeros((BLOCK_Q,), tl.float32)
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        bias = 0.0
        if BIASED:
            bias = tl.load(bias_ptr).to(tl.float32) * 1.4426950408889634  # log2(e)
        if COUNTED:
            bias = tl.load(last_bias_ptr + batch) * 1.4426950408889634
        slot = tl.arange(0, BLOCK_K)

        # Whole blocks: those of the biased keys, then those of the others, which begin at key `biased`.
        first = biased // BLOCK_K
        whole = first + (keys - biased) // BLOCK_K
        if COUNTED:
            keys = tl.load(count_ptr + batch)
            whole = (keys - 1) // BLOCK_K  # the last key has a bias: it goes to the block that looks at each
        for block in range(whole):
            start = (block * BLOCK_K + tl.where(block < first, 0, biased % BLOCK_K)).to(tl.int64)
            k = _rows(k_ptr + start * k_token, slot, None, k_token, D, BLOCK_D)
            v = _rows(v_ptr + start * v_token, slot, None, v_token, D, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            extra = tl.where(block < first, bias, 0.0)
            sums, weight, top = _absorb(sums, weight, top, scores, v, extra, SCALE, PRECISION)

        # What is left: the last biased keys, then the last of the others.
        ends = biased % BLOCK_K
        left = keys - whole * BLOCK_K
        for start in range(0, left, BLOCK_K):
            place = start + slot
            key = tl.where(place < ends, first * BLOCK_K, whole * BLOCK_K).to(tl.int64) + place
            k = _rows(k_ptr, key, place < left, k_token, D, BLOCK_D)
            v = _rows(v_ptr, key, place < left, v_token, D, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            extra = tl.where(place < ends, bias / SCALE, 0.0)
            if COUNTED:
                extra = tl.where(place == left - 1, bias / SCALE, 0.0)
            scores += tl.where(place < left, extra, float("-inf"))[None, :]
            sums, weight, top = _absorb(sums, weight, top, scores, v, 0.0, SCALE, PRECISION)

        channel = tl.arange(0, BLOCK_D)
        out = out_ptr + ((batch * queries + query) * heads + head)[:, None] * D + channel[None, :]
        mask = (query < queries)[:, None] & (channel < D)[None, :]
        tl.store(out, (sums / weight[:, None]).to(out_ptr.dtype.element_ty), mask)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    keys: int = 0,
    count: Tensor | None = None,
    last_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias of the first `keys` keys) v; or, of `count` keys only, + that of the last.

    Triton on CUDA; `attention_ref` elsewhere.

    Args:
        q: [B, Tq, H, D], D contiguous, a multiple of 16 up to 128.
        k, v: [B, Tk, H, D], D contiguous, Tk > 0, in q's dtype.
        bias: 0-dim, finite, added to the scores of the first `keys` keys; read on the device. None: nothing is.
        keys: how many.
        count: int32 [B], each 1 to Tk, read on the device: how many keys to attend to. Not with `bias`. None: all.
        last_bias: fp32 [B], with `count`: finite, added to the scores of the last key attended to.

    Returns:
        [B, Tq, H, D], contiguous, in q's dtype; sums and softmax in fp32.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, with what was got and expected.
    """
    _check(q, k, v, bias, keys)
    check_count(q, bias, count, last_bias)
    if q.is_cuda and triton is not None:
        return launch(q, k, v, bias, keys, count=count, last_bias=last_bias)
    return attention_ref(q, k, v, bias, keys, count, last_bias)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    keys: int = 0,
    config: AttentionConfig | None = None,
    *,
    count: Tensor | None = None,
    last_bias: Tensor | None = None,
) -> Tensor:
    """Launch the Triton kernel; arguments as for `attention`, which has checked them. config: None: the table's."""
    batch, queries, heads, head_dim = q.shape
    config = config or _config_for(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Batches and heads along the second axis: programs that run at the same time share a head's keys in the L2 cache.
    _attention_kernel[(triton.cdiv(queries, config.queries), batch * heads)](
        q, k, v, bias, count, last_bias, out, heads, queries, k.shape[1], 0 if bias is None else keys,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        SCALE=math.log2(math.e) * head_dim**-0.5, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_Q=config.queries, BLOCK_K=config.keys,
        BIASED=bias is not None, COUNTED=count is not None, PRECISION="ieee",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def _config_for(q: Tensor) -> AttentionConfig:
    capability = torch.cuda.get_device_properties(q.device).major if q.is_cuda else 8  # the interpreter's
    return AttentionConfig.choose(q.shape[3], q.dtype, capability)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keys: int) -> None:
    if q.dim() != 4 or q.shape[3] % HEAD_STEP or not 0 < q.shape[3] <= LARGEST_HEAD or q.dtype not in DTYPES:
        raise ValueError(
            f"q: got {q.dtype} {tuple(q.shape)}; expected bf16, fp16 or fp32 [B, Tq, H, D], "
            f"D a multiple of {HEAD_STEP} up to {LARGEST_HEAD}"
        )
    batch, _, heads, head_dim = q.shape
    if (
        k.dim() != 4
        or k.shape != (batch, k.shape[1], heads, head_dim)
        or k.shape != v.shape
        or not k.shape[1]
    ):
        raise ValueError(
            f"k, v: got shapes {tuple(k.shape)}, {tuple(v.shape)}; expected {[batch, 'Tk', heads, head_dim]}, Tk > 0"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 or x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, strides {x.stride()}; expected {q.dtype}, contiguous D")
    if bias is not None and (bias.dim() != 0 or not 0 <= keys <= k.shape[1]):
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)} for {keys} keys; expected a 0-dim tensor, 0 to {k.shape[1]} keys"
        )


def check_count(q: Tensor, bias: Tensor | None, count: Tensor | None, last_bias: Tensor | None) -> None:
    """Raise the ValueErrors of `attention` about the number of keys."""
    if count is None and last_bias is None:
        return
    if count is None or last_bias is None or bias is not None:
        raise ValueError("count, last_bias: got one of them, or a bias too; expected both, and no bias")
    for name, x, dtype in (("count", count, torch.int32), ("last_bias", last_bias, torch.float32)):
        if x.shape != q.shape[:1] or x.dtype != dtype or x.device != q.device or not x.is_contiguous():
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device}; "
                f"expected contiguous {dtype} {tuple(q.shape[:1])} on {q.device}"
            )
