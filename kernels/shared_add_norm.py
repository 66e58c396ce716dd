"""`adaln.add_norm` over partial products of several ranks: sum, residual, LayerNorm and modulation in one kernel.

A product whose inputs are spread over N ranks leaves a part of its sum on each. All-reducing it moves every token to
every rank, which then all do the same work on it. Here a rank does that work for its T / N tokens alone: it reads them
from every rank, adds in fp32, in rank order, keeps the new residual to itself and stores the normalised tokens on
every rank, whose next product wants them all. What used to be an exchange is where a kernel reads and writes that
runs anyway (after Korthikanti et al. 2022, arXiv:2205.05198, where residuals are spread the same way).

Every partial product must be complete before, and every store before anybody reads: the caller waits for the ranks.

Shapes: T tokens of all ranks, C channels, F latent frames of T / F consecutive tokens, N ranks of T / N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wanrt_kernels.adaln import (
    AddNormConfig,
    add_norm_ref,
    add_norm_rows_ref,
    check_modulation,
    frame_strides,
    frames_of,
)
from wanrt_kernels.quant_rows import Rows
from wanrt_kernels.shared import Shared, check_shared

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.adaln import normalise_row
    from wanrt_kernels.quant_rows import quantise_row
    from wanrt_kernels.shared import pointer_on
except ImportError:  # a CPU build of PyTorch brings no Triton, and has no other rank's memory either
    triton = None


def shared_add_norm_ref(
    x: Tensor,
    partials: Sequence[Tensor],
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    rank: int,
    eps: float,
    plus_one: bool = True,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What rank `rank` computes, of every rank's partial product: (total, normed) of its share, [1, T / N, C]."""
    update, *modulation = _share(partials, gate, scale, shift, rank)
    return add_norm_ref(x, update, *modulation, eps=eps, plus_one=plus_one, normed_dtype=normed_dtype)


def shared_add_norm_rows_ref(
    x: Tensor,
    partials: Sequence[Tensor],
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    rank: int,
    eps: float,
    plus_one: bool = True,
) -> tuple[Tensor, Rows]:
    """As `shared_add_norm_ref`, quantised."""
    update, *modulation = _share(partials, gate, scale, shift, rank)
    return add_norm_rows_ref(x, update, *modulation, eps=eps, plus_one=plus_one)


def _share(
    partials: Sequence[Tensor], gate: Tensor | None, scale: Tensor, shift: Tensor, rank: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Sum, gate, scale and shift of a rank's tokens, each token a frame of its own."""
    update = torch.stack([p.float() for p in partials]).sum(0)
    tokens = update.shape[1]
    mine = slice(rank * tokens // len(partials), (rank + 1) * tokens // len(partials))
    rows = [
        v if v is None or v.dim() == 1 else v.repeat_interleave(tokens // v.shape[1], dim=1)[:, mine]
        for v in (gate, scale, shift)
    ]
    return update[:, mine], *rows  # type: ignore[return-value]


if triton is not None:

    @triton.jit
    def _shared_add_norm_kernel(
        x_ptr, partial_ptr, partials, gate_ptr, scale_ptr, shift_ptr,
        total_ptr, out_ptr, outs, row_scale_ptr, row_scales,
        rank, first, frame_tokens, gate_frame, scale_frame, shift_frame,
        EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
        HAS_GATE: tl.constexpr, PLUS_ONE: tl.constexpr, QUANTISE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        token = first + row
        frame = token // frame_tokens
        channel = tl.arange(0, BLOCK)
        mask = channel < C
        total = tl.load(x_ptr + row * C + channel, mask, 0.0).to(tl.float32)
        there = token * C + channel
        update = tl.load(pointer_on(0, partial_ptr, partials) + there, mask, 0.0).to(tl.float32)
        for r in tl.static_range(1, RANKS):
            update += tl.load(pointer_on(r, partial_ptr, partials) + there, mask, 0.0).to(tl.float32)
        if HAS_GATE:
            update *= tl.load(gate_ptr + frame * gate_frame + channel, mask, 0.0)
        total += update
        tl.store(total_ptr + row * C + channel, total.to(total_ptr.dtype.element_ty), mask)
        normed = normalise_row(
            total, mask, scale_ptr + frame * scale_frame + channel, shift_ptr + frame * shift_frame + channel,
            EPS, C, PLUS_ONE,
        )  # fmt: skip
        if QUANTISE:
            normed, row_scale = quantise_row(normed)
        out = normed.to(out_ptr.dtype.element_ty)
        # each rank begins with itself: all at once would find the way to rank 0 too narrow
        for i in tl.static_range(RANKS):
            r = (rank + i) % RANKS
            tl.store(pointer_on(r, out_ptr, outs) + there, out, mask)
            if QUANTISE:
                tl.store(pointer_on(r, row_scale_ptr, row_scales) + token, row_scale)


def shared_add_norm(
    x: Tensor,
    partial: Shared,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    out: Shared,
    *,
    rank: int,
    eps: float,
    plus_one: bool = True,
) -> Tensor:
    """`total = x + gate * sum of partials`; `LayerNorm(total) * (1 + scale) + shift` to every rank's `out`.

    Triton only (its interpreter on a CPU).

    Args:
        x: [1, T / N, C], contiguous, tokens rank * T / N and on.
        partial: [1, T, C] in x's dtype, a part of the sum on every rank.
        gate: [1, F, C] fp32, one factor per latent frame and channel, or None: 1.
        scale, shift: both [1, F, C] fp32, or both [C]: the weight and bias of a plain LayerNorm.
        out: [1, T, C]; this rank's tokens are written, on all ranks, rounded to its dtype once.
        rank: of this process, 0..N-1.
        eps: of the LayerNorm.
        plus_one: add 1 to `scale` (False for a plain weight).

    Returns:
        total, [1, T / N, C] in x's dtype; arithmetic in fp32, `out` from the unrounded total.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, each with what was got and expected.
    """
    check_shared("out", out, partial.here.shape, out.here.dtype)
    return _launch(x, partial, gate, scale, shift, out, None, rank, eps, plus_one)


def shared_add_norm_rows(
    x: Tensor,
    partial: Shared,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    out: Shared,
    row_scale: Shared,
    *,
    rank: int,
    eps: float,
    plus_one: bool = True,
) -> Tensor:
    """`shared_add_norm` with its tokens quantised: the values of `quant_rows.Rows` to `out`, their scales beside.

    Arguments, result and errors as `shared_add_norm`. `row_scale`: [1, T, 1] fp32. `out` in fp32 leaves the rounding
    of values out, for tests (Triton's interpreter loses its carries).
    """
    check_shared("out", out, partial.here.shape, out.here.dtype)
    check_shared("row_scale", row_scale, (*partial.here.shape[:-1], 1), torch.float32)
    return _launch(x, partial, gate, scale, shift, out, row_scale, rank, eps, plus_one)


def _launch(
    x: Tensor,
    partial: Shared,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    out: Shared,
    row_scale: Shared | None,
    rank: int,
    eps: float,
    plus_one: bool,
) -> Tensor:
    _check(x, partial, gate, scale, shift, rank)
    (_, share, channels), tokens = x.shape, partial.here.shape[1]
    total = torch.empty_like(x)
    config = AddNormConfig.for_channels(channels)
    _shared_add_norm_kernel[(share,)](
        x, *partial, gate, scale, shift,
        total, *out, *(row_scale or (None, None)),
        rank, rank * share, tokens // frames_of(gate, scale),
        *(frame_strides(values)[1] for values in (gate, scale, shift)),
        EPS=eps, C=channels, BLOCK=config.block, RANKS=len(partial.addresses),
        HAS_GATE=gate is not None, PLUS_ONE=plus_one, QUANTISE=row_scale is not None,
        num_warps=config.warps,
    )  # fmt: skip
    return total


def _check(x: Tensor, partial: Shared, gate: Tensor | None, scale: Tensor, shift: Tensor, rank: int) -> None:
    ranks = len(partial.addresses)
    if x.dim() != 3 or x.shape[0] != 1 or not x.is_contiguous() or not 0 <= rank < ranks:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()} on rank {rank}; "
            f"expected contiguous [1, T / N, C] on one of {ranks} ranks"
        )
    check_shared("partial", partial, (1, ranks * x.shape[1], x.shape[2]), x.dtype)
    check_modulation(partial.here, gate, scale, shift)
