"""Residual addition, LayerNorm and modulation of a transformer's tokens in one pass over memory.

A Wan block is `x += gate * f(LayerNorm(x) * (1 + scale) + shift)`, twice, with a LayerNorm that has a weight and a
bias of its own between (Wan-Video/Wan2.1 `wan/modules/model.py`, commit 9737cba, `WanAttentionBlock`). Every step is
"finish the last residual, then normalise for the next product", so this kernel does just that: it reads `x` and the
last product's output once and writes the new `x` and the normalised tokens once, with fp32 in between. For products
in fp8 it writes the normalised tokens as quantised rows (`quant_rows`): one pass serves q, k and v.

Shapes: B batch, T tokens, C channels; F latent frames, each of T/F consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.quant_rows import FP8, Rows, quantise_rows_ref

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.quant_rows import quantise_row
except ImportError:  # a CPU build of PyTorch brings no Triton; `add_norm_ref` serves there
    triton = None

HAVE_TRITON = triton is not None


@dataclass(frozen=True)
class AddNormConfig:
    """Launch shape: `block` channels (a power of two, one token a program) and warps."""

    block: int
    warps: int

    @classmethod
    def for_channels(cls, channels: int) -> AddNormConfig:
        """A token stays in registers: 64 values per thread at 8192, the padded 14B width.

        H100, 2160 tokens of 5120: four warps take 35 us, and 37 with quantised rows; eight 35 and 43.
        """
        block = 1 << (channels - 1).bit_length()
        return cls(block=block, warps=max(1, min(4, block // 512)))


def add_norm_ref(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    plus_one: bool = True,
    normed_dtype: torch.dtype | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `add_norm` computes, in plain differentiable PyTorch. Same arguments, same results."""
    frames = frames_of(gate, scale)
    total = x.float().unflatten(1, (frames, -1))
    if update is not None:
        update = update.float().unflatten(1, (frames, -1))
        total = total + update if gate is None else torch.addcmul(total, update, _rows(gate))
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], eps=eps)
    factor = _rows(scale) + 1 if plus_one else _rows(scale)
    normed = torch.addcmul(_rows(shift), normed, factor).flatten(1, 2).to(normed_dtype or x.dtype)
    if update is None:
        return x, normed
    total = total if ahead is None else total + ahead.float()
    return total.flatten(1, 2).to(x.dtype), normed


def add_norm_rows_ref(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    plus_one: bool = True,
) -> tuple[Tensor, Rows]:
    """Compute what `add_norm_rows` computes, in plain PyTorch. Same arguments, same results."""
    total, normed = add_norm_ref(
        x, update, gate, scale, shift, eps=eps, plus_one=plus_one, normed_dtype=torch.float32
    )
    return total, quantise_rows_ref(normed)


def _rows(values: Tensor) -> Tensor:
    """[C] as it is, [B, F, C] as [B, F, 1, C]; fp32."""
    return values.float() if values.dim() == 1 else values.float().unsqueeze(2)


def frames_of(gate: Tensor | None, scale: Tensor) -> int:
    """How many latent frames the per-frame values speak of; 1 without any."""
    return next((v.shape[1] for v in (gate, scale) if v is not None and v.dim() == 3), 1)


if triton is not None:

    @triton.jit
    def normalise_row(
        total, mask, scale_ptrs, shift_ptrs, EPS: tl.constexpr, C: tl.constexpr, PLUS_ONE: tl.constexpr
    ):
        """LayerNorm and modulation of one token [BLOCK] fp32 with zeros from C on; zeros from C on."""
        centred = tl.where(mask, total - tl.sum(total, axis=0) / C, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / C + EPS)
        scale = tl.load(scale_ptrs, mask, 0.0).to(tl.float32)
        shift = tl.load(shift_ptrs, mask, 0.0).to(tl.float32)
        if PLUS_ONE:
            scale += 1.0
        return normed * scale + shift  # past the end every load gave 0 and `centred` is 0

    @triton.jit
    def _add_norm_kernel(
        x_ptr, update_ptr, gate_ptr, scale_ptr, shift_ptr, ahead_ptr, total_ptr, out_ptr, row_scale_ptr,
        tokens, frame_tokens,
        gate_batch, gate_frame, scale_batch, scale_frame, shift_batch, shift_frame,
        EPS: tl.constexpr,  # as an argument, torch.compile would make it, and all that meets it, fp64
        C: tl.constexpr, BLOCK: tl.constexpr,
        HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_AHEAD: tl.constexpr, PLUS_ONE: tl.constexpr,
        QUANTISE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        batch = row // tokens
        frame = (row % tokens) // frame_tokens
        channel = tl.arange(0, BLOCK)
        mask = channel < C
        here = row * C + channel
        total = tl.load(x_ptr + here, mask, 0.0).to(tl.float32)
        if HAS_UPDATE:
            update = tl.load(update_ptr + here, mask, 0.0).to(tl.float32)
            if HAS_GATE:
                update *= tl.load(gate_ptr + batch * gate_batch + frame * gate_frame + channel, mask, 0.0)
            total += update
            stored = total
            if HAS_AHEAD:
                stored += tl.load(ahead_ptr + channel, mask, 0.0).to(tl.float32)
            tl.store(total_ptr + here, stored.to(total_ptr.dtype.element_ty), mask)
        normed = normalise_row(
            total, mask,
            scale_ptr + batch * scale_batch + frame * scale_frame + channel,
            shift_ptr + batch * shift_batch + frame * shift_frame + channel,
            EPS, C, PLUS_ONE,
        )  # fmt: skip
        if QUANTISE:
            normed, row_scale = quantise_row(normed)
            tl.store(row_scale_ptr + row, row_scale)
        tl.store(out_ptr + here, normed.to(out_ptr.dtype.element_ty), mask)


def add_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    plus_one: bool = True,
    normed_dtype: torch.dtype | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`total = x + update * gate + ahead`; `normed = LayerNorm(x + update * gate) * (1 + scale) + shift`.

    Triton on CUDA; `add_norm_ref` elsewhere, and wherever a gradient is wanted.

    Args:
        x: [B, T, C], contiguous.
        update: [B, T, C], contiguous, in x's dtype, or None: nothing to add.
        gate: [B, F, C] fp32, one factor per latent frame and channel, or None: 1.
        scale, shift: both [B, F, C] fp32, or both [C]: the weight and bias of a plain LayerNorm.
        eps: of the LayerNorm.
        plus_one: add 1 to `scale` (False for a plain weight).
        normed_dtype: of `normed`; None: as x.
        ahead: [C], in x's dtype, or None: what is to be in `total` and not yet in what is normalised, as the bias of a
            product that adds onto `total` and has no other place for it. Only with `update`.

    Returns:
        `(total, normed)`, both [B, T, C], arithmetic in fp32, `normed` from the unrounded numbers; `total` is in x's
        dtype, and is `x` itself without `update`.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, each with what was got and expected.
    """
    _check(x, update, gate, scale, shift)
    _check_ahead(x, update, ahead)
    fast = x.is_cuda and triton is not None and not needs_gradient(x, update, gate, scale, shift, ahead)
    compute = launch if fast else add_norm_ref
    return compute(
        x, update, gate, scale, shift, eps=eps, plus_one=plus_one, normed_dtype=normed_dtype, ahead=ahead
    )


def add_norm_rows(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    plus_one: bool = True,
) -> tuple[Tensor, Rows]:
    """`add_norm` with its second result quantised to fp8 rows, from the unrounded numbers; no gradient.

    Triton on CUDA, `add_norm_rows_ref` elsewhere. Arguments, `total` and errors as `add_norm`.
    """
    _check(x, update, gate, scale, shift)
    if x.is_cuda and triton is not None:
        return launch_rows(x, update, gate, scale, shift, eps=eps, plus_one=plus_one)
    return add_norm_rows_ref(x, update, gate, scale, shift, eps=eps, plus_one=plus_one)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with any of these: kernels have no backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def launch(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    plus_one: bool,
    normed_dtype: torch.dtype | None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the Triton kernel; arguments as for `add_norm`, which has checked them."""
    total = x if update is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=normed_dtype)
    _launch(x, update, gate, scale, shift, ahead, total, out, None, eps, plus_one)
    return total, out


def launch_rows(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    plus_one: bool,
    dtype: torch.dtype = FP8,
) -> tuple[Tensor, Rows]:
    """Launch the Triton kernel; arguments as for `add_norm_rows`, which has checked them.

    `dtype` of the values: fp32 leaves the rounding out, for tests (Triton's interpreter loses its carries).
    """
    total = x if update is None else torch.empty_like(x)
    out = Rows.empty(x, dtype)
    _launch(x, update, gate, scale, shift, None, total, out.values, out.scale, eps, plus_one)
    return total, out


def _launch(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    ahead: Tensor | None,
    total: Tensor,
    out: Tensor,
    row_scale: Tensor | None,
    eps: float,
    plus_one: bool,
) -> None:
    batch, tokens, channels = x.shape
    config = AddNormConfig.for_channels(channels)
    _add_norm_kernel[(batch * tokens,)](
        x, update, gate, scale, shift, ahead, total, out, row_scale,
        tokens, tokens // frames_of(gate, scale),
        *frame_strides(gate), *frame_strides(scale), *frame_strides(shift),
        EPS=eps, C=channels, BLOCK=config.block,
        HAS_UPDATE=update is not None, HAS_GATE=gate is not None, HAS_AHEAD=ahead is not None,
        PLUS_ONE=plus_one, QUANTISE=row_scale is not None,
        num_warps=config.warps,
    )  # fmt: skip


def frame_strides(values: Tensor | None) -> tuple[int, int]:
    """From one batch entry and from one latent frame to the next; 0 for values of all."""
    if values is None or values.dim() == 1:
        return 0, 0
    return values.stride(0), values.stride(1)


def _check(x: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor) -> None:
    if x.dim() != 3 or not x.is_contiguous():
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected contiguous [B, T, C]"
        )
    if update is not None and (
        update.shape != x.shape or update.dtype != x.dtype or not update.is_contiguous()
    ):
        raise ValueError(
            f"update: got {update.dtype} {tuple(update.shape)}; expected contiguous {x.dtype} {tuple(x.shape)}, as x"
        )
    check_modulation(x, gate, scale, shift)


def _check_ahead(x: Tensor, update: Tensor | None, ahead: Tensor | None) -> None:
    if ahead is None:
        return
    if update is None:
        raise ValueError("ahead: got one without an update; expected both, as x itself is not written to")
    if ahead.shape != x.shape[2:] or ahead.dtype != x.dtype or not ahead.is_contiguous():
        raise ValueError(
            f"ahead: got {ahead.dtype} {tuple(ahead.shape)}; expected contiguous {x.dtype} {tuple(x.shape[2:])}"
        )


def check_modulation(x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor) -> None:
    """Raise the ValueErrors of `add_norm` about its values per frame or channel."""
    frames = {v.shape[1] for v in (gate, scale, shift) if v is not None and v.dim() == 3}
    for name, values in (("gate", gate), ("scale", scale), ("shift", shift)):
        if values is not None and not _fits(values, x, name == "gate", frames):
            raise ValueError(
                f"{name}: got shape {tuple(values.shape)}, strides {values.stride()}; expected [B, F, C] for "
                f"{x.shape[0]} batch entries, frames that divide {x.shape[1]} tokens and are the same for all, "
                f"{x.shape[2]} channels, or (scale and shift) [C]"
            )


def _fits(values: Tensor, x: Tensor, is_gate: bool, frames: set[int]) -> bool:
    if values.stride(-1) != 1 or values.shape[-1] != x.shape[2]:
        return False
    if values.dim() == 1:
        return not is_gate
    return (
        values.dim() == 3
        and values.shape[0] == x.shape[0]
        and len(frames) == 1
        and x.shape[1] % min(frames) == 0
    )
