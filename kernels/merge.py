"""Merge attention over two disjoint sets of keys into attention over both, one set biased by a scalar.

Attention over a set of keys is an average with weights exp(score); its log-sum-exp says how much weight there was.
Averages over two sets are thus merged by the share of their weights, and adding log(b) to every score of one set
adds log(b) to its log-sum-exp and changes nothing else (Dao et al. 2023, flash decoding; arXiv:2501.01005). So the
KV bias costs this kernel and no masked attention.

Shapes: B batch, T queries, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton; `merge_ref` serves there
    triton = None

BLOCK_HEADS = 8  # heads of one query a program: with head_dim 128 eight numbers of each tensor a thread
WARPS = 4


def merge_ref(biased: Tensor, biased_lse: Tensor, plain: Tensor, plain_lse: Tensor, bias: Tensor) -> Tensor:
    """Compute what `merge` computes, in plain PyTorch."""
    share = torch.sigmoid(biased_lse.float() + bias.float() - plain_lse.float())
    share = share.transpose(1, 2)[..., None]
    return torch.lerp(plain.float(), biased.float(), share).to(plain.dtype)


if triton is not None:

    @triton.jit
    def _merge_kernel(
        biased_ptr, biased_lse_ptr, plain_ptr, plain_lse_ptr, bias_ptr, out_ptr,
        queries, biased_batch, biased_query, biased_head, plain_batch, plain_query, plain_head,
        biased_lse_batch, biased_lse_head, biased_lse_query, plain_lse_batch, plain_lse_head, plain_lse_query,
        H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        batch, query = row // queries, row % queries
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        within = tl.arange(0, BLOCK_D)
        biased_lse_ptr += batch * biased_lse_batch + query * biased_lse_query
        plain_lse_ptr += batch * plain_lse_batch + query * plain_lse_query
        a = tl.load(biased_lse_ptr + head * biased_lse_head, head < H, 0.0)
        b = tl.load(plain_lse_ptr + head * plain_lse_head, head < H, 0.0)
        share = tl.sigmoid(a + tl.load(bias_ptr).to(tl.float32) - b)[:, None]
        mask = (head < H)[:, None] & (within < D)[None, :]
        biased_ptr += batch * biased_batch + query * biased_query
        plain_ptr += batch * plain_batch + query * plain_query
        x = tl.load(biased_ptr + head[:, None] * biased_head + within[None, :], mask, 0.0).to(tl.float32)
        y = tl.load(plain_ptr + head[:, None] * plain_head + within[None, :], mask, 0.0).to(tl.float32)
        out = out_ptr + row * H * D + head[:, None] * D + within[None, :]
        tl.store(out, (y + share * (x - y)).to(out_ptr.dtype.element_ty), mask)


def merge(biased: Tensor, biased_lse: Tensor, plain: Tensor, plain_lse: Tensor, bias: Tensor) -> Tensor:
    """Attention over both sets of keys.

    Args:
        biased: [B, T, H, D], attention over the biased keys alone, D contiguous.
        biased_lse: [B, H, T] fp32, natural log of the sum of exp(score) over them, without the bias.
        plain, plain_lse: the same over the other keys.
        bias: 0-dim, log(b); read on the device.

    Returns:
        [B, T, H, D], contiguous, in the dtype of `plain`; arithmetic in fp32.

    Raises:
        ValueError: shapes or layout that do not fit, with what was got and expected.
    """
    _check(biased, biased_lse, plain, plain_lse, bias)
    if plain.is_cuda and triton is not None:
        return launch(biased, biased_lse, plain, plain_lse, bias)
    return merge_ref(biased, biased_lse, plain, plain_lse, bias)


def launch(biased: Tensor, biased_lse: Tensor, plain: Tensor, plain_lse: Tensor, bias: Tensor) -> Tensor:
    """Launch the Triton kernel; arguments as for `merge`, which has checked them."""
    batch, queries, heads, head_dim = plain.shape
    out = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
    _merge_kernel[(batch * queries, triton.cdiv(heads, BLOCK_HEADS))](
        biased, biased_lse, plain, plain_lse, bias, out,
        queries, *biased.stride()[:3], *plain.stride()[:3],
        *biased_lse.stride(), *plain_lse.stride(),
        H=heads, D=head_dim, BLOCK_H=BLOCK_HEADS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=WARPS,
    )  # fmt: skip
    return out


def _check(biased: Tensor, biased_lse: Tensor, plain: Tensor, plain_lse: Tensor, bias: Tensor) -> None:
    if plain.dim() != 4 or biased.shape != plain.shape or biased.stride(3) != 1 or plain.stride(3) != 1:
        raise ValueError(
            f"biased, plain: got shapes {tuple(biased.shape)}, {tuple(plain.shape)}; "
            f"expected the same [B, T, H, D] with contiguous D"
        )
    batch, queries, heads, _ = plain.shape
    for name, lse in (("biased_lse", biased_lse), ("plain_lse", plain_lse)):
        if tuple(lse.shape) != (batch, heads, queries) or lse.dtype != torch.float32:
            raise ValueError(
                f"{name}: got {lse.dtype} {tuple(lse.shape)}; expected fp32 {[batch, heads, queries]}"
            )
    if bias.dim() != 0:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}; expected a 0-dim tensor")
