"""Attention of video tokens: to video, with an optional scalar bias on a leading run of keys, and to a padded text.

Shapes: B batch, T tokens, H heads, D head_dim. Queries `[B, Tq, H, D]`, keys and values `[B, Tk, H, D]`;
the views that scaled_dot_product_attention wants are made here without copies.

The cache keeps the biased keys in front of all others (see `kv_cache.py`), so that the biased and the
unbiased keys are one contiguous range each: two plain attention calls can be merged by their log-sum-exp, and a kernel
of wanrt's own needs no mask.

A text is padded to a fixed length, and every key of the padding is the same, as is every value. Softmax over m equal
keys is softmax over one of them with log(m) added to its score, so a text costs its own keys and one for its padding,
where a kernel can bound its keys by a number on the device (`TextSpan`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.models.flash4 import HAVE_FLASH_4, flash_4, why_no_flash_4
from wanrt_kernels import hopper_attention as hopper
from wanrt_kernels.adaln import HAVE_TRITON
from wanrt_kernels.attention import HEAD_STEP, LARGEST_HEAD, attention
from wanrt_kernels.merge import merge

Pair = tuple[Tensor, Tensor]  # attention and its log-sum-exp
Call = Callable[[], Pair]


class AttentionBackend(StrEnum):
    """Who computes attention."""

    AUTO = "auto"  # by `choose`
    SDPA = "sdpa"  # torch decides
    CUDNN = "cudnn"
    FLASH = "flash"  # FlashAttention-2 inside torch
    FA4 = "fa4"  # FlashAttention-4, a package of its own
    HOPPER = "hopper"  # wanrt's own kernel for compute capability 9.0 and heads of 128
    TRITON = "triton"  # wanrt's own kernel
    MATH = "math"  # products and softmax written out, scores in fp32

    @property
    def bias_by(self) -> str:
        """How a KV bias is applied."""
        if self is AttentionBackend.SDPA:
            return "an additive mask"
        return "the same call" if self.is_own else "two calls merged"

    @property
    def is_own(self) -> bool:
        """Whether it is a kernel of wanrt's: those attend to a text's `TextSpan` instead of to all of its padding."""
        return self in (AttentionBackend.HOPPER, AttentionBackend.TRITON)


@dataclass(frozen=True)
class Default:
    """A line of `CUDA_DEFAULTS` or `TEXT_DEFAULTS`.

    Attributes:
        backend: what AUTO takes, if it is installed.
        capabilities: on devices of these compute capabilities (major).
        biased: only with a KV bias (True), only without (False), or either way (None).
        fewest_rows, most_rows: queries times heads, of all of the batch.
        head_dim: only heads of so many numbers; None: any.
    """

    backend: AttentionBackend
    capabilities: range
    biased: bool | None = None
    fewest_rows: int = 0
    most_rows: int = sys.maxsize
    head_dim: int | None = None

    def fits(self, capability: int, head_dim: int, rows: int, *, biased: bool) -> bool:
        """Whether this line is meant for such a call, and what it names can run here."""
        return (
            (HAVE_FLASH_4 or self.backend is not AttentionBackend.FA4)
            and (self.backend is not AttentionBackend.TRITON or _why_no_triton(head_dim) is None)
            and capability in self.capabilities
            and self.head_dim in (None, head_dim)
            and self.biased in (None, biased)
            and self.fewest_rows <= rows <= self.most_rows
        )


# What AUTO takes on CUDA in half precisions with head_dim <= 128: the first line that fits.
#
# H100, ms a call in bf16, heads of 128, without a KV bias / with one on a third of the keys:
#
#   heads, queries, keys   hopper, with   cudnn           fa4             triton          flash           sdpa, with
#   40, 2160, 4320         0.289          0.354 / 0.372   0.305 / 0.331   0.418 / 0.408   0.605 / 0.621   0.554
#   20, 2160, 4320         0.152          0.181 / 0.200   0.156 / 0.178   0.228 / 0.245*
#   10, 2160, 4320         0.095          0.124 / 0.111   0.102 / 0.098   0.142 / 0.128
#   40, 4680, 9360         1.257          1.489 / 1.535   1.458 / 1.501   2.065 / 2.040   2.698 / 2.658   2.370
#   20, 4680, 9360         0.727          0.807 / 0.783   0.699 / 0.742
#
# hopper: 40 heads of its present form, 10 and 20 x 4680 of one that was 10 % slower; a bias costs it 0 to 2 %.
# triton: tiles of 64x64; * of 128x128, which at 40 heads and 4680 queries take 1.894 / 2.010.
# A line that names fa4 would count only where it is installed; none does.
CUDA_DEFAULTS = (
    Default(AttentionBackend.HOPPER, range(9, 10), head_dim=hopper.HEAD_DIM),
    Default(AttentionBackend.CUDNN, range(9, 11)),
    # every GPU since Ampere has it
    Default(AttentionBackend.FLASH, range(8, sys.maxsize)),
)

# As `CUDA_DEFAULTS`, for attention to a text: who takes a span. Where no line fits, AUTO takes who attends to video,
# and all of the padding. H100, us a call with 40 heads and 2160 queries, to 25, 129, 257 and 512 keys: hopper 31, 31,
# 38 and 57, triton 34, 47, 58 and 74; cudnn to 512 keys 50.
#
# On a CPU AUTO attends to the padding: wan-tiny has but 32 keys, and torch's kernel for CPUs is fast for multiples of
# 16 only. Its 336 queries take 0.24 ms with all keys, 0.64 with 13 and a mask, and 0.17 with 16 and a mask, which would
# be 0.2 % of the passes of a chunk.
TEXT_DEFAULTS = (
    Default(AttentionBackend.HOPPER, range(9, 10), head_dim=hopper.HEAD_DIM),
    Default(AttentionBackend.TRITON, range(8, sys.maxsize)),
)


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


@dataclass(frozen=True)
class TextSpan:
    """How much of a padded text to attend to: its own keys, and one key of the padding for all of them.

    Both are read on the device only: changing them in place neither recompiles nor re-captures.

    Attributes:
        count: `[B]` int32, how many leading keys: tokens + 1, or all where nothing is padded.
        last_bias: `[B]` fp32, log of how many keys the last of these stands for.
    """

    count: Tensor
    last_bias: Tensor

    @classmethod
    def of(cls, embeddings: Tensor) -> TextSpan:
        """Of padded embeddings `[B, text_len, text_dim]`, zero after the last token. Waits for no device."""
        text_len = embeddings.shape[1]
        ends = torch.arange(1, text_len + 1, dtype=torch.int32, device=embeddings.device)
        tokens = (embeddings.ne(0).any(-1) * ends).amax(1)
        count = (tokens + 1).clamp(max=text_len)
        return cls(count, (text_len + 1 - count).float().log())

    def copy_(self, other: TextSpan) -> TextSpan:
        """Overwrite in place, so that captured graphs see another text at the old addresses."""
        self.count.copy_(other.count)
        self.last_bias.copy_(other.last_bias)
        return self


def why_not(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `backend` cannot compute attention there, in a few words; None: it can."""
    if backend in (AttentionBackend.AUTO, AttentionBackend.SDPA, AttentionBackend.MATH):
        return None
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if _capability(device) < 8:
        return f"{torch.cuda.get_device_name(device)} is older than SM 8.0"
    if backend is AttentionBackend.TRITON:
        return _why_no_triton(head_dim)
    if backend is AttentionBackend.HOPPER:
        return hopper.unsupported(device, head_dim, dtype)
    if dtype is torch.float32:
        return f"{dtype} is not a half precision"
    if head_dim > LARGEST_HEAD or head_dim % 8:
        return f"heads of {head_dim}, not of a multiple of 8 up to {LARGEST_HEAD}"
    if backend is AttentionBackend.FA4:
        return why_no_flash_4(_capability(device))
    missing = {
        AttentionBackend.CUDNN: not torch.backends.cudnn.is_available(),
        AttentionBackend.FLASH: not torch.backends.cuda.is_flash_attention_available(),
    }
    return "this build of PyTorch does not have it" if missing[backend] else None


def _capability(device: torch.device) -> int:
    """CUDA compute capability, major."""
    return torch.cuda.get_device_properties(device).major


def _why_no_triton(head_dim: int) -> str | None:
    if not HAVE_TRITON:
        return "Triton is not installed"
    if head_dim > LARGEST_HEAD or head_dim % HEAD_STEP:
        return f"heads of {head_dim}, not of a multiple of {HEAD_STEP} up to {LARGEST_HEAD}"
    return None


def choose(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    rows: int,
    biased: bool,
) -> AttentionBackend:
    """Resolve AUTO; anything else is what it is. `rows`: queries times heads; `biased`: with a KV bias."""
    if backend is not AttentionBackend.AUTO:
        return backend
    found = _first_that_fits(CUDA_DEFAULTS, device, dtype, head_dim, rows, biased=biased)
    return AttentionBackend.SDPA if found is None else found


def choices(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int, *, biased: bool
) -> tuple[AttentionBackend, ...]:
    """All that `choose` may say there, for any number of rows."""
    found = (choose(backend, device, dtype, head_dim, rows=rows, biased=biased) for rows in _edges())
    return tuple(dict.fromkeys(found))


def choose_for_text(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int, *, rows: int
) -> AttentionBackend:
    """As `choose`, for attention to a text."""
    if backend is AttentionBackend.AUTO:
        found = _first_that_fits(TEXT_DEFAULTS, device, dtype, head_dim, rows, biased=False)
        backend = backend if found is None else found
    return choose(backend, device, dtype, head_dim, rows=rows, biased=False)


def choices_for_text(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[AttentionBackend, ...]:
    """All that `choose_for_text` may say there, for any number of rows."""
    found = (choose_for_text(backend, device, dtype, head_dim, rows=rows) for rows in _edges())
    return tuple(dict.fromkeys(found))


def _edges() -> list[int]:
    """The numbers of rows from which on another line may fit."""
    lines = CUDA_DEFAULTS + TEXT_DEFAULTS
    edges = {edge for line in lines for edge in (line.fewest_rows, line.most_rows + 1)}
    return sorted(edge for edge in edges | {0} if edge <= sys.maxsize)


def _first_that_fits(
    table: tuple[Default, ...],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    *,
    biased: bool,
) -> AttentionBackend | None:
    """What a table of defaults says of such a call; None: nothing."""
    half = dtype is not torch.float32
    if device.type != "cuda" or not half or head_dim > LARGEST_HEAD or head_dim % 8:
        return None
    capability = _capability(device)
    for line in table:
        if line.fits(capability, head_dim, rows, biased=biased):
            return line.backend
    return None


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
    bias = None if bias is None or bias.keys == 0 else bias
    batch, queries, heads, head_dim = q.shape
    rows = batch * queries * heads
    backend = choose(backend, q.device, q.dtype, head_dim, rows=rows, biased=bias is not None)
    if backend.is_own:
        own = _own_kernel(backend)
        return own(q, k, v) if bias is None else own(q, k, v, bias.value, bias.keys)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is AttentionBackend.SDPA:
        mask = None if bias is None else _key_mask(bias, q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    if bias is None:
        return _attend_lse(q, k, v, backend)[0].transpose(1, 2)
    return _attend_merged(q, k, v, bias, backend)


def attend_text(
    q: Tensor, k: Tensor, v: Tensor, span: TextSpan, *, backend: AttentionBackend = AttentionBackend.AUTO
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all keys of a padded text, by its `span` where the backend takes one.

    Args:
        q: `[B, Tq, H, D]`.
        k, v: `[B, text_len, H, D]`, same dtype as `q`, padding included; all padding is alike.
        span: of this text.
        backend: who computes it; AUTO: by `choose_for_text`.

    Returns:
        `[B, Tq, H, D]` in the dtype of `q`.
    """
    batch, queries, heads, head_dim = q.shape
    backend = choose_for_text(backend, q.device, q.dtype, head_dim, rows=batch * queries * heads)
    if backend.is_own:
        return _own_kernel(backend)(q, k, v, count=span.count, last_bias=span.last_bias)
    return attend(q, k, v, backend=backend)


def _own_kernel(backend: AttentionBackend) -> Callable[..., Tensor]:
    """Of a backend that `is_own`; both take the same arguments."""
    return hopper.hopper_attention if backend is AttentionBackend.HOPPER else attention


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
    if backend is AttentionBackend.FA4:
        out, lse = flash_4(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2), lse
    if backend is AttentionBackend.CUDNN:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, lse.reshape(q.shape[:3])
    if backend is AttentionBackend.FLASH:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse.reshape(q.shape[:3])
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse
