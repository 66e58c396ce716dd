"""Tokens of one rank with all heads into tokens of all ranks with a share of the heads, and back: no exchange between.

Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509) moves queries, keys and values to the ranks that
attend with their heads, and what was attended back to the ranks of its tokens. A library's all-to-all wants packed
input and gives packed output: four passes over memory beside the exchange. Here the kernel that makes a number (norm
and rotation, or the copy of v) stores it at its final address on whichever GPU: keys and values in that rank's cache.
The caller sees to it that those addresses may be written, and waits for the other ranks afterwards.

Shapes: F latent frames of the pass, M tokens of a frame on each of N ranks, T = F * M, C = H * D channels; W slots of
a frame, W = N * M. Batch is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.rope_norm import RopeNormConfig, rope_norm_ref

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.rope_norm import turned_row
    from wanrt_kernels.shared import pointer_on
except ImportError:  # a CPU build of PyTorch brings no Triton; the references serve there
    triton = None


@dataclass(frozen=True)
class OwnTokens:
    """Which tokens a rank has, and where frames are kept.

    Attributes:
        rank, ranks: it is the rank-th of so many; it has the rank-th part of every frame.
        frames: F.
        tokens: M.
        first: slot of a frame in the destination that frame `turn` goes to; frame f goes to first + (f - turn) mod F.
        turn: see `first`.
    """

    rank: int
    ranks: int
    frames: int
    tokens: int
    first: int = 0
    turn: int = 0

    def slots(self) -> Tensor:
        """int64 [T]: where in a destination of whole frames each of this rank's tokens goes."""
        frame = torch.arange(self.frames)[:, None]
        slot = self.first + (frame - self.turn) % self.frames
        within = self.rank * self.tokens + torch.arange(self.tokens)
        return (slot * self.ranks * self.tokens + within).flatten()

    def rows(self) -> Tensor:
        """int64 [T]: each of this rank's tokens among all tokens of the pass."""
        within = self.rank * self.tokens + torch.arange(self.tokens)
        return (torch.arange(self.frames)[:, None] * self.ranks * self.tokens + within).flatten()


def scatter_heads_ref(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    to: list[Tensor],
    own: OwnTokens,
    *,
    head_dim: int,
    eps: float,
) -> None:
    """Do what `scatter_heads` does, into one tensor [slots, H / N, D] a rank, in plain PyTorch."""
    rows = own.rows().to(x.device)
    if cos is not None and sin is not None:
        cos, sin = cos[rows], sin[rows]
    turned = rope_norm_ref(x, weight, cos, sin, head_dim=head_dim, eps=eps)[0]
    for part, destination in zip(turned.chunk(own.ranks, dim=1), to, strict=True):
        destination[own.slots().to(x.device)] = part


def scatter_tokens_ref(x: Tensor, to: list[Tensor], own: OwnTokens) -> None:
    """Do what `scatter_tokens` does, into one tensor [T, H, D] a rank, in plain PyTorch."""
    heads = x.shape[1]
    parts = x.unflatten(0, (own.frames, own.ranks, own.tokens)).unbind(1)
    for part, destination in zip(parts, to, strict=True):
        destination[:, own.rank * heads : (own.rank + 1) * heads] = part.flatten(0, 1)


if triton is not None:

    @triton.jit
    def _scatter_heads_kernel(
        x_ptr, weight_ptr, cos_ptr, sin_ptr, addresses_ptr,
        x_token, rank, frames, own, first, turn,
        EPS: tl.constexpr,  # as an argument, torch.compile would make it, and all that meets it, fp64
        C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
        RANKS: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        frame, within = token // own, token % own
        whole = own * RANKS
        within += rank * own
        channel = tl.arange(0, BLOCK)
        mask = channel < C
        y = turned_row(
            x_ptr + token.to(tl.int64) * x_token, weight_ptr, cos_ptr, sin_ptr, frame * whole + within,
            None, EPS, C, D, BLOCK, NORM, ROPE,
        )  # fmt: skip
        y = y.to(x_ptr.dtype.element_ty)
        slot = (first + (frame - turn + frames) % frames).to(tl.int64) * whole + within
        share: tl.constexpr = C // RANKS
        for to in tl.static_range(RANKS):
            out_ptr = pointer_on(to, x_ptr, addresses_ptr)
            here = (channel >= to * share) & (channel < (to + 1) * share)
            tl.store(out_ptr + slot * share + (channel - to * share), y, mask & here)

    @triton.jit
    def _scatter_tokens_kernel(
        x_ptr, addresses_ptr, x_token, x_head, rank, own,
        H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        whole = own * RANKS
        frame, within = token // whole, token % whole
        to, place = within // own, frame * own + within % own
        channel = tl.arange(0, BLOCK)
        mask = channel < H * D
        x_ptr += token.to(tl.int64) * x_token
        x = tl.load(x_ptr + (channel // D) * x_head + channel % D, mask)
        out_ptr = pointer_on(to, x_ptr, addresses_ptr)
        tl.store(out_ptr + (place.to(tl.int64) * RANKS + rank) * (H * D) + channel, x, mask)


def scatter_heads(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    addresses: Tensor,
    own: OwnTokens,
    *,
    head_dim: int,
    eps: float,
) -> None:
    """`rotate(x / rms(x) * weight)`, each head stored on the rank that attends with it.

    Args:
        x: [1, T, C], channels contiguous: this rank's tokens, frame after frame.
        weight: [C] of the RMSNorm over all channels; None: no norm.
        cos, sin: [F * W, D/2] fp32, contiguous, of all ranks' tokens; None: no rotation.
        addresses: int64 [N], on x's device: of a buffer [slots, H / N, D] in x's dtype, on every rank.
        own: which tokens these are, and which frames of the buffers they go to.
        head_dim: D, even.
        eps: of the RMSNorm.

    Raises:
        ValueError: shapes or layout that do not fit, with what was got and expected.
    """
    _check_heads(x, weight, cos, sin, addresses, own, head_dim)
    channels = x.shape[2]
    config = RopeNormConfig.for_channels(channels)
    _scatter_heads_kernel[(x.shape[1],)](
        x, weight, cos, sin, addresses,
        x.stride(1), own.rank, own.frames, own.tokens, own.first, own.turn,
        EPS=eps, C=channels, D=head_dim, BLOCK=config.block, NORM=weight is not None, ROPE=cos is not None,
        RANKS=own.ranks, num_warps=config.warps,
    )  # fmt: skip


def scatter_tokens(x: Tensor, addresses: Tensor, own: OwnTokens) -> None:
    """What was attended with this rank's heads, each token stored on the rank that has it.

    Args:
        x: [F * W, H / N, D], D contiguous: all tokens.
        addresses: int64 [N], on x's device: of a buffer [T, H, D] in x's dtype, on every rank.
        own: this rank's; `first` and `turn` are not read.

    Raises:
        ValueError: shapes or layout that do not fit, with what was got and expected.
    """
    tokens, heads, head_dim = x.shape
    whole = own.frames * own.ranks * own.tokens
    if tokens != whole or x.stride(2) != 1:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected {whole} tokens, contiguous heads"
        )
    _check_addresses(addresses, own.ranks)
    config = RopeNormConfig.for_channels(heads * head_dim)
    _scatter_tokens_kernel[(tokens,)](
        x, addresses, x.stride(0), x.stride(1), own.rank, own.tokens,
        H=heads, D=head_dim, BLOCK=config.block, RANKS=own.ranks, num_warps=config.warps,
    )  # fmt: skip


def _check_heads(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    addresses: Tensor,
    own: OwnTokens,
    head_dim: int,
) -> None:
    tokens = own.frames * own.tokens
    if x.dim() != 3 or x.shape[:2] != (1, tokens) or x.stride(2) != 1:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, strides {x.stride()}; expected [1, {tokens}, C], contiguous channels"
        )
    channels = x.shape[2]
    if head_dim % 2 or channels % (head_dim * own.ranks):
        raise ValueError(
            f"x: got {channels} channels; expected heads of the even {head_dim} for each of {own.ranks} ranks"
        )
    expected = {
        "weight": (weight, (channels,)),
        "cos": (cos, (tokens * own.ranks, head_dim // 2)),
        "sin": (sin, (tokens * own.ranks, head_dim // 2)),
    }
    for name, (values, shape) in expected.items():
        if values is not None and (tuple(values.shape) != shape or not values.is_contiguous()):
            raise ValueError(f"{name}: got shape {tuple(values.shape)}; expected contiguous {list(shape)}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: got one of them; expected both or neither")
    _check_addresses(addresses, own.ranks)


def _check_addresses(addresses: Tensor, ranks: int) -> None:
    if tuple(addresses.shape) != (ranks,) or addresses.dtype != torch.int64:
        raise ValueError(
            f"addresses: got {addresses.dtype} {tuple(addresses.shape)}; expected int64 [{ranks}]"
        )
