"""What tensor parallelism puts in the place of whole parts. Parameters keep the names that they have there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanrt.models.memory import Elementwise
from wanrt.parallel.collectives import sum_over
from wanrt_kernels.rope_norm import rope_norm


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are spread over the group: `[..., in / N]` to the whole `[..., out]`.

    Every rank has the whole bias, and the first adds it, inside its product: the sum contains it once, and nobody
    makes another pass over the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        # the sum of every rank's part, written over this one; an fp8 product that takes this layer's place keeps it
        self.join = partial(sum_over, group=group)
        self.adds_bias = group.rank() == 0

    def forward(self, x: Tensor) -> Tensor:
        """Partial product, all-reduce."""
        return self.join(F.linear(x, self.weight, self.bias if self.adds_bias else None))


def spread_rope_norm(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    out: Tensor | None = None,
    inverse_rms: Tensor | None = None,
    group: ProcessGroup,
) -> Tensor:
    """`wanrt_kernels.rope_norm.rope_norm` of `[B, T, C / N]`, the heads of this rank."""
    if weight is not None and inverse_rms is None:
        (inverse_rms,) = spread_inverse_rms((x,), eps, group=group)
    return rope_norm(x, weight, cos, sin, head_dim=head_dim, eps=eps, out=out, inverse_rms=inverse_rms)


def spread_inverse_rms(
    projections: Sequence[Tensor], eps: float, *, group: ProcessGroup
) -> tuple[Tensor, ...]:
    """1 / rms over the heads of all ranks, fp32 `[B, T, 1]`, of projections `[B, T, C / N]` of one shape.

    Wan normalises q and k over the full width, not head by head, so a rank needs the others' squares: one
    all-reduce of a number a token and projection.
    """
    squares = torch.stack([x.float().square().sum(-1, keepdim=True) for x in projections])
    width = projections[0].shape[-1] * group.size()
    return torch.rsqrt(sum_over(squares, group) / width + eps).unbind()


def spread_elementwise(whole: Elementwise, group: ProcessGroup) -> Elementwise:
    """The elementwise work of a model whose heads are spread over `group`; residuals are whole everywhere."""
    return replace(
        whole,
        rope_norm=partial(spread_rope_norm, group=group),
        inverse_rms=partial(spread_inverse_rms, group=group),
    )
