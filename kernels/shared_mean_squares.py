"""The mean of squares of every token's channels on this rank, stored on every rank: what an RMSNorm over all needs.

Wan normalises queries and keys over the full width before it splits heads. Where heads are spread over ranks, each
knows the squares of its own channels only. This kernel reads them once and stores one number a token on every rank;
`rope_norm` averages the N numbers that lie there in the end.

All stores must be complete before anybody reads: the caller waits for the ranks.

Shapes: B batch, T tokens, C channels of this rank, P projections, N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.shared import Shared, check_shared

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.shared import pointer_on
except ImportError:  # a CPU build of PyTorch brings no Triton, and has no other rank's memory either
    triton = None

MOST = 2  # projections of one call: queries and keys


@dataclass(frozen=True)
class MeanSquaresConfig:
    """Launch shape: `rows` tokens of `block` channels (powers of two) a program, and warps."""

    rows: int
    block: int
    warps: int

    @classmethod
    def for_channels(cls, channels: int) -> MeanSquaresConfig:
        """64 values a thread, as the other kernels of a token have, in so many tokens that stores have neighbours."""
        block = 1 << (channels - 1).bit_length()
        rows = max(1, min(16, 8192 // block))
        return cls(rows=rows, block=block, warps=max(1, min(4, rows * block // 512)))


def mean_squares_ref(projections: Sequence[Tensor]) -> Tensor:
    """What a rank stores in its own slot on every rank: [P, B, T] fp32."""
    return torch.stack([x.float().square().mean(-1) for x in projections])


if triton is not None:

    @triton.jit
    def _means(x_ptr, row, tokens, x_batch, x_token, channel, mask, C: tl.constexpr):
        begin = x_ptr + (row // tokens) * x_batch + (row % tokens) * x_token
        x = tl.load(begin[:, None] + channel[None, :], mask, 0.0).to(tl.float32)
        return tl.sum(x * x, axis=1) / C

    @triton.jit
    def _mean_squares_kernel(
        first_ptr, second_ptr, out_ptr, outs, rank,
        rows, tokens, first_batch, first_token, second_batch, second_token,
        C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, SECOND: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, BLOCK)
        inside = row < rows
        mask = inside[:, None] & (channel < C)[None, :]
        first = _means(first_ptr, row, tokens, first_batch, first_token, channel, mask, C)
        slot = rank * rows
        if SECOND:
            second = _means(second_ptr, row, tokens, second_batch, second_token, channel, mask, C)
            slot *= 2
        for i in tl.static_range(RANKS):
            there = pointer_on((rank + i) % RANKS, out_ptr, outs) + slot + row
            tl.store(there, first, inside)
            if SECOND:
                tl.store(there + rows, second, inside)


def store_mean_squares(projections: Sequence[Tensor], out: Shared, *, rank: int) -> None:
    """Store the mean of squares of `projections` in this rank's slot on every rank.

    Triton only (its interpreter on a CPU).

    Args:
        projections: one or two [B, T, C], of one shape and dtype, channels contiguous.
        out: [N, P, B, T] fp32; slot `rank` is written, on all ranks.
        rank: of this process, 0..N-1.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, each with what was got and expected.
    """
    _check(projections, out, rank)
    first, second = projections[0], projections[-1]
    batch, tokens, channels = first.shape
    config = MeanSquaresConfig.for_channels(channels)
    _mean_squares_kernel[(triton.cdiv(batch * tokens, config.rows),)](
        first, second, *out, rank,
        batch * tokens, tokens, *first.stride()[:2], *second.stride()[:2],
        C=channels, ROWS=config.rows, BLOCK=config.block, RANKS=len(out.addresses), SECOND=len(projections) == MOST,
        num_warps=config.warps,
    )  # fmt: skip


def _check(projections: Sequence[Tensor], out: Shared, rank: int) -> None:
    shapes = [tuple(x.shape) for x in projections]
    alike = len(set(shapes)) == 1 and all(x.dim() == 3 and x.stride(2) == 1 for x in projections)
    if not 1 <= len(projections) <= MOST or not alike:
        raise ValueError(
            f"projections: got shapes {shapes}; expected one or two of the same [B, T, C] with contiguous channels"
        )
    ranks = len(out.addresses)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: got {rank}; expected one of {ranks}")
    check_shared("out", out, (ranks, len(projections), *shapes[0][:2]), torch.float32)
