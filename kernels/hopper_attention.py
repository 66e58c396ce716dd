"""Attention with a scalar bias on a run of keys, for Hopper: `hopper_attention.cu` and what surrounds it.

Shapes: B batch, Tq queries, Tk keys, H heads of 128.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from wanrt_kernels import cubins, nvrtc
from wanrt_kernels.attention import check_count
from wanrt_kernels.hopper import (
    ARCHITECTURE,
    SHARED_BYTES,
    TYPES,
    operands,
    registers,
    source,
    tensor_map,
    unsupported_device,
)
from wanrt_kernels.peer_heads import OwnTokens

HEAD_DIM, QUERIES, THREADS = 128, 128, 384  # numbers of a head, queries of a tile, threads of a block
HALF = 64  # numbers of a head in a row of 128 bytes, as far as the copy engine's swizzle reaches
PART_FLOATS = (HEAD_DIM // 2 + 4) * 256  # of a part of a tile: what all workers have
KEYS = 144  # of a block: of 128, 144, 160 and 176 the fastest on an H100; frames of 720 and 1560 tokens waste few
DESCRIPTOR_HIGH = 1 << 30 | 1024 >> 4  # swizzle of 128 bytes; 1024 bytes from a group of 8 rows to the next
LEAST_BLOCKS = 4  # of keys that a sharer of a tile should have: to store and to add a part costs about one


@dataclass(frozen=True)
class Form:
    """One compiled form: keys of a block, "f16" or "bf16", and whether a number on the device bounds the keys."""

    keys: int
    kind: str
    counted: bool = False

    def source(self) -> str:
        """The kernel's CUDA C++ with this form's numbers in front."""
        scale = f"{math.log2(math.e) / math.sqrt(HEAD_DIM)!r}f"
        numbers = {"KEYS": self.keys, "COUNTED": int(self.counted), "SCALE": scale}
        return source("hopper_attention.cu", self.kind, numbers, products_source(self.keys, self.kind))


def products_source(keys: int, kind: str) -> str:
    """`score` and `gather`, the kernel's two products. They take the low words of their operands' descriptors.

    score: 64 x `keys` sums = (or +=, with `add`) 64 x 16 times 16 x `keys`, both in shared memory.
    gather: 64 x 128 sums += 64 x 16, in registers, times 16 x 128 in shared memory, rows contiguous.
    """
    scores, sums = keys // 2, HEAD_DIM // 2  # a thread's
    return f"""__device__ __forceinline__ void score(float (&d)[{scores}], unsigned a, unsigned b, int add) {{
    asm volatile("{{\\n.reg .pred p;\\n.reg .b64 a, b;\\nsetp.ne.b32 p, %{scores + 2}, 0;\\n"
                 "mov.b64 a, {{%{scores}, {DESCRIPTOR_HIGH}}};\\nmov.b64 b, {{%{scores + 1}, {DESCRIPTOR_HIGH}}};\\n"
                 "wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.{kind}.{kind} "
                 "{{{registers(scores)}}}, a, b, p, 1, 1, 0, 0;\\n}}"
                 : {operands("d", scores)} : "r"(a), "r"(b), "r"(add));
}}
__device__ __forceinline__ void gather(
    float (&d)[{sums}], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b) {{
    asm volatile("{{\\n.reg .b64 b;\\nmov.b64 b, {{%{sums + 4}, {DESCRIPTOR_HIGH}}};\\n"
                 "wgmma.mma_async.sync.aligned.m64n{HEAD_DIM}k16.f32.{kind}.{kind} "
                 "{{{registers(sums)}}}, {{%{sums}, %{sums + 1}, %{sums + 2}, %{sums + 3}}}, b, 1, 1, 1, 1;\\n}}"
                 : {operands("d", sums)} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b));
}}
"""


@dataclass(frozen=True)
class Schedule:
    """Which block computes what.

    Attributes:
        tiles: of queries, of all heads.
        down: of them, of a head.
        whole: tiles that one block has whole, in turns; the others are cut into equal runs of blocks of keys.
        sharers: how many blocks share those; 0: there are none.
    """

    tiles: int
    down: int
    whole: int
    sharers: int

    @classmethod
    def choose(
        cls, heads: int, queries: int, blocks: int, processors: int, *, share: bool = True
    ) -> Schedule:
        """For `heads` (of all of the batch) and `blocks` of keys a tile.

        Rounds of tiles that fill all processors stay whole. The last, if it does not, is shared if that is worth it.
        """
        down = -(-queries // QUERIES)
        tiles = heads * down
        rest = tiles % processors
        sharers = min(processors, rest * blocks // LEAST_BLOCKS)
        if not share or sharers < rest or -(-rest * blocks // max(sharers, 1)) + LEAST_BLOCKS // 2 >= blocks:
            return cls(tiles, down, tiles, 0)
        return cls(tiles, down, tiles - rest, sharers)

    @property
    def shared(self) -> int:
        """Tiles that are shared."""
        return self.tiles - self.whole


class _Call(ctypes.Structure):
    """`Call` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bias", "count", "parts", "arrived", "out", "addresses")),
        *((name, ctypes.c_int) for name in ("frame_tokens", "out_tokens", "out_heads", "out_head")),
        *((name, ctypes.c_int) for name in ("heads", "queries", "keys", "biased")),
        *((name, ctypes.c_int) for name in ("down", "whole", "tiles", "sharers")),
    ]


def unsupported(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot attend there, in a few words; None: it can."""
    return unsupported_device(device, dtype) or (
        None if head_dim == HEAD_DIM else f"heads of {head_dim}, not {HEAD_DIM}"
    )


# An operator, as torch.compile cannot trace what is behind it.
@torch.library.custom_op(
    "wanrt_kernels::hopper_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias=None, int keys=0, Tensor? count=None, Tensor? last_bias=None)"
    " -> Tensor",
)
def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    keys: int = 0,
    count: Tensor | None = None,
    last_bias: Tensor | None = None,
) -> Tensor:
    """As `wanrt_kernels.attention.attention`, for heads of 128 in a half precision on Hopper.

    Tensors must begin, and their rows lie, at multiples of 16 bytes; the numbers of a head are contiguous.

    Raises:
        ValueError: shapes, layout or dtypes that do not fit, with what was got and expected.
        NvrtcError: what the compiler or the driver says.
    """
    return launch(q, k, v, bias, keys, count, last_bias)


@hopper_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def hopper_attention_to(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keys: int, addresses: Tensor, own: OwnTokens
) -> None:
    """`hopper_attention`, each token's heads stored on the rank that has the token.

    Args:
        q, k, v, bias, keys: as there, of all tokens and this rank's heads; a batch of 1.
        addresses: int64 [N], on q's device: of a buffer [T, N * H, 128] in q's dtype, on every rank.
        own: this rank's; `first` and `turn` are not read.
    """
    _check(q, k, v, bias, keys)
    whole = own.ranks * own.tokens
    if q.shape[:2] != (1, own.frames * whole) or tuple(addresses.shape) != (own.ranks,):
        raise ValueError(
            f"q, addresses: got {tuple(q.shape)}, {tuple(addresses.shape)}; expected [1, {own.frames * whole}, H, "
            f"{HEAD_DIM}] and [{own.ranks}]"
        )
    heads = q.shape[2]
    to = {
        "addresses": addresses.data_ptr(), "frame_tokens": whole, "out_tokens": own.tokens,
        "out_heads": own.ranks * heads, "out_head": own.rank * heads,
    }  # fmt: skip
    _launch(q, k, v, bias, keys, None, to, KEYS)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    keys: int = 0,
    count: Tensor | None = None,
    last_bias: Tensor | None = None,
    *,
    block: int = KEYS,
) -> Tensor:
    """Launch with blocks of so many keys; else as `hopper_attention`."""
    _check(q, k, v, bias, keys)
    check_count(q, bias, count, last_bias)
    out = q.new_empty(q.shape)
    _launch(q, k, v, bias if count is None else last_bias, keys, count, {"out": out.data_ptr()}, block)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    biased: int,
    count: Tensor | None,
    to: dict[str, int],
    block: int,
) -> None:
    """to: the fields of `_Call` that say where outputs go."""
    kind, code = TYPES[q.dtype]
    form = Form(block, kind, count is not None)
    batch, queries, heads, _ = q.shape
    tokens = k.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    blocks = -(-tokens // form.keys)
    plan = Schedule.choose(batch * heads, queries, blocks, processors, share=count is None)
    parts = q.new_empty(2 * plan.sharers * PART_FLOATS, dtype=torch.float32)
    arrived = q.new_zeros(2 * plan.shared, dtype=torch.int32) if plan.shared else parts
    call = _Call(
        **{name: None if x is None else x.data_ptr() for name, x in (("bias", bias), ("count", count))},
        parts=parts.data_ptr(), arrived=arrived.data_ptr(), **to,
        heads=heads, queries=queries, keys=tokens, biased=biased,
        down=plan.down, whole=plan.whole, tiles=plan.tiles, sharers=plan.sharers,
    )  # fmt: skip
    box = (HALF, 1, form.keys, 1)
    with torch.cuda.device(q.device):
        maps = (
            tensor_map(q, (HALF, 1, QUERIES, 1), code, swizzle=128),
            tensor_map(k, box, code, swizzle=128),
            tensor_map(v, box, code, swizzle=128),
        )
        grid = max(min(processors, plan.whole), plan.sharers)
        _function(form, q.device.index)(grid, THREADS, (*maps, call))


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keys: int) -> None:
    batch, _, heads, head_dim = q.shape
    if reason := unsupported(q.device, head_dim, q.dtype):
        raise ValueError(f"hopper_attention: {reason}; use wanrt_kernels.attention")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, k.shape[1], heads, HEAD_DIM) or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}; expected {q.dtype} "
                f"[{batch}, {k.shape[1]}, {heads}, {HEAD_DIM}] on {q.device}"
            )
    if k.shape[1] < 1 or not 0 <= keys <= k.shape[1]:
        raise ValueError(
            f"keys: got {keys} biased of {k.shape[1]}; expected at least one key, at most all biased"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(s % 8 for s in x.stride()[:3]):
            raise ValueError(
                f"{name}: got strides {x.stride()} at {x.data_ptr():#x}; expected contiguous heads, all else at "
                f"multiples of 16 bytes"
            )
    if bias is not None and (bias.dtype != torch.float32 or bias.device != q.device):
        raise ValueError(f"bias: got {bias.dtype} on {bias.device}; expected fp32 on {q.device}")


@cache
def _function(form: Form, device: int) -> nvrtc.Function:
    """Loaded once a form and device; compiled, where that is not kept, in about a second."""
    return nvrtc.Function(cubins.cubin(form.source(), ARCHITECTURE), "hopper_attention", SHARED_BYTES)
