"""The three exchanges of a sharded transformer. Each takes its group; none knows of a world."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of every rank's `x`, written over `x`, which must be contiguous."""
    dist.all_reduce(x, group=group)
    return x


def gather(x: Tensor, axis: int, group: ProcessGroup) -> Tensor:
    """Every rank's `x` side by side along `axis`, in rank order."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=axis)


def swap(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-to-all along the first axis, which has one entry per rank: entry r goes to rank r."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def tokens_to_heads(x: Tensor, frames: int, group: ProcessGroup) -> Tensor:
    """From a share of the tokens with all heads to all tokens with a share of the heads.

    Args:
        x: `[..., frames * m, H, D]`, this rank's m tokens of each latent frame.
        frames: latent frames of the pass.
        group: of N ranks, N divides H.

    Returns:
        `[..., frames * N * m, H / N, D]`, tokens frame-major in their own order.
    """
    n = group.size()
    parts = x.unflatten(-3, (frames, -1)).unflatten(-2, (n, -1)).movedim(-3, 0)
    return swap(parts, group).movedim(0, -4).flatten(-5, -3)


def heads_to_tokens(x: Tensor, frames: int, group: ProcessGroup) -> Tensor:
    """The way back: `[..., frames * N * m, H / N, D]` to `[..., frames * m, H, D]`."""
    n = group.size()
    parts = x.unflatten(-3, (frames, n, -1)).movedim(-4, 0)
    return swap(parts, group).movedim(0, -3).flatten(-3, -2).flatten(-4, -3)
