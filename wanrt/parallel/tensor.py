"""What tensor parallelism puts in the place of whole parts. Parameters keep the names that they have there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanrt.models.fp8 import Room
from wanrt.models.memory import Elementwise
from wanrt.parallel.collectives import sum_over
from wanrt.parallel.fused_exchange import FusedExchange
from wanrt_kernels.rope_norm import rope_norm


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are spread over the group: `[..., in / N]` to the whole `[..., out]`.

    Every rank has the whole bias, and the first adds it, inside its product: the sum contains it once, and nobody
    makes another pass over the result.

    room: where a partial product goes that is not to be summed here, see `Room`; None: every one is.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, group: ProcessGroup, room: Room | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        # an fp8 product that takes this layer's place keeps these
        self.join = partial(sum_over, group=group)  # the sum of every rank's part, written over this one
        self.room = room
        self.adds_bias = group.rank() == 0

    def forward(self, x: Tensor) -> Tensor:
        """Partial product, then an all-reduce; or the partial product alone, in its room."""
        bias = self.bias if self.adds_bias else None
        room = None if self.room is None else self.room((*x.shape[:-1], len(self.weight)), self.weight.dtype)
        if room is None:
            return self.join(F.linear(x, self.weight, bias))
        rows, weight, out = x.flatten(0, -2), self.weight.t(), room.flatten(0, -2)
        if bias is None:
            torch.mm(rows, weight, out=out)
        else:
            torch.addmm(bias, rows, weight, out=out)
        return room


def spread_rope_norm(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    out: Tensor | None = None,
    mean_squares: Tensor | None = None,
    spread: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> Tensor:
    """`wanrt_kernels.rope_norm.rope_norm` of `[B, T, C / N]`, the heads of this rank.

    spread: an `Elementwise.mean_squares` over the ranks, asked where the caller has not.
    """
    if weight is not None and mean_squares is None:
        (mean_squares,) = spread((x,))
    return rope_norm(x, weight, cos, sin, head_dim=head_dim, eps=eps, out=out, mean_squares=mean_squares)


def spread_mean_squares(projections: Sequence[Tensor], *, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Mean of squares over the heads of all ranks, fp32 `[B, T, 1]`, of projections `[B, T, C / N]` of one shape.

    Wan normalises q and k over the full width, not head by head, so a rank needs the others' squares: one
    all-reduce of a number a token and projection.
    """
    squares = torch.stack([x.float().square().mean(-1, keepdim=True) for x in projections])
    return sum_over(squares / group.size(), group).unbind()


def spread_elementwise(whole: Elementwise, group: ProcessGroup) -> Elementwise:
    """The elementwise work of a model whose heads are spread over `group`; residuals are whole everywhere."""
    mean_squares = partial(spread_mean_squares, group=group)
    return replace(whole, rope_norm=partial(spread_rope_norm, spread=mean_squares), mean_squares=mean_squares)


def fused_elementwise(exchange: FusedExchange) -> Elementwise:
    """As `spread_elementwise`, with residuals spread too, tokens of a rank each, and no collective in between."""
    return replace(
        exchange.whole,
        add_norm=exchange.add_norm,
        add_norm_rows=exchange.add_norm_rows,
        rope_norm=partial(spread_rope_norm, spread=exchange.mean_squares),
        mean_squares=exchange.mean_squares,
    )
