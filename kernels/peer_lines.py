"""A picture's border lines and parts stored into other ranks' memory, and what arrived put in its place.

Bands of a picture on several ranks exchange their outermost lines behind every convolution, dozens of times a frame.
A library's send and receive want each line packed and unpacked and cost some 30 us whatever its size. Here one kernel
stores a rank's lines into its neighbours' rooms, and after a barrier another one puts those that arrived where they
belong. An exchange is: `send_lines` or `send_part` on every rank, a barrier of all ranks, `take_lines` on every rank.

Every room has two sets of places, used in turn, and one barrier an exchange is then enough. Say exchange e uses a set
on some rank; it is next written to in exchange e + 2, by a rank that has left the barrier of e + 1. To that barrier
the room's owner came only after it had taken what arrived in e, since kernels of one stream run in order. The turn is
counted in device memory, so captured graphs of any number of exchanges can be replayed in any order among others, as
long as all ranks do the same. The sending kernel reads one word of `Room.turn` and writes the other, the taking kernel
the other way round: no program of a launch can see what another one of it wrote.

Shapes: a line, or part, is R rows of K values; the values of a row are contiguous. N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt_kernels.shared import Shared

try:
    import triton
    import triton.language as tl

    from wanrt_kernels.shared import pointer_on
except ImportError:  # a CPU build of PyTorch brings no Triton; the references serve there
    triton = None

ALIGNMENT = 16  # bytes: what a thread stores at once


@dataclass(frozen=True)
class Room:
    """Where a rank's lines arrive.

    Attributes:
        memory: uint8 [2, S], S a multiple of 16.
        turn: int64 [2], on the device, zeros at first: number of the next exchange, and of the one under way. One for
            all rooms of a rank.
    """

    memory: Shared
    turn: Tensor

    @property
    def own(self) -> Tensor:
        """This rank's memory."""
        return self.memory.here

    def places(self, dtype: torch.dtype) -> Tensor:
        """[2, values]: both sets as values of this type. A view."""
        return self.own.view(dtype)


def spacing(values: int, dtype: torch.dtype) -> int:
    """Values from one line to the next in a set, so that each begins at a multiple of 16 bytes."""
    unit = ALIGNMENT // dtype.itemsize
    return -(-values // unit) * unit


@dataclass(frozen=True)
class LineConfig:
    """Launch shape: `rows` x `columns` values a program (powers of two) and warps."""

    rows: int
    columns: int
    warps: int

    @classmethod
    def of(cls, columns: int) -> LineConfig:
        """2048 values a program: 16 a thread of four warps, two stores of 16 bytes in half precision."""
        wide = min(2048, 1 << (columns - 1).bit_length())
        return cls(rows=2048 // wide, columns=wide, warps=4)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Programs for so many rows and columns."""
        return -(-rows // self.rows), -(-columns // self.columns)


def send_lines_ref(
    first: Tensor | None, last: Tensor | None, rooms: list[Tensor], exchange: int, rank: int
) -> None:
    """Do what `send_lines` does in exchange number `exchange`, into every rank's `Room.own`, in plain PyTorch."""
    for line, to, place in ((first, rank - 1, 1), (last, rank + 1, 0)):
        if line is not None:
            start = place * spacing(line.numel(), line.dtype)
            room = rooms[to].view(line.dtype)[exchange % 2]
            room[start : start + line.numel()] = line.flatten()


def take_lines_ref(before: Tensor | None, after: Tensor | None, own: Tensor, exchange: int) -> None:
    """Do what `take_lines` does in exchange number `exchange`, from this rank's `Room.own`, in plain PyTorch."""
    for line, place in ((before, 0), (after, 1)):
        if line is not None:
            start = place * spacing(line.numel(), line.dtype)
            room = own.view(line.dtype)[exchange % 2]
            line.copy_(room[start : start + line.numel()].view_as(line))


def send_part_ref(part: Tensor, rooms: list[Tensor], exchange: int, columns: int, start: int) -> None:
    """Do what `send_part` does in exchange number `exchange`, into these ranks' `Room.own`, in plain PyTorch."""
    rows, own = part.shape
    for room in rooms:
        whole = room.view(part.dtype)[exchange % 2, : rows * columns].view(rows, columns)
        whole[:, start : start + own] = part


if triton is not None:

    @triton.jit
    def _tile(rows, columns, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        return row[:, None], column[None, :], (row < rows)[:, None] & (column < columns)[None, :]

    @triton.jit
    def _turn(turn_ptr, READ: tl.constexpr, AHEAD: tl.constexpr):
        """The number of this exchange; for the next kernel, in the other word, that plus `AHEAD`."""
        exchange = tl.load(turn_ptr + READ)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(turn_ptr + 1 - READ, exchange + AHEAD)
        return exchange % 2

    @triton.jit
    def _send_lines_kernel(
        first_ptr, last_ptr, addresses_ptr, turn_ptr,
        rank, rows, columns, row_stride, set_stride, place_stride,
        FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        row, column, mask = _tile(rows, columns, BLOCK_R, BLOCK_K)
        place = _turn(turn_ptr, 0, 0) * set_stride + row * columns + column
        here = row * row_stride + column
        if FIRST:
            values = tl.load(first_ptr + here, mask)
            to = pointer_on(rank - 1, first_ptr, addresses_ptr)
            tl.store(to + place_stride + place, values, mask)
        if LAST:
            values = tl.load(last_ptr + here, mask)
            to = pointer_on(rank + 1, last_ptr, addresses_ptr)
            tl.store(to + place, values, mask)

    @triton.jit
    def _take_lines_kernel(
        before_ptr, after_ptr, own_ptr, turn_ptr,
        rows, columns, row_stride, set_stride, place_stride,
        BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        row, column, mask = _tile(rows, columns, BLOCK_R, BLOCK_K)
        place = _turn(turn_ptr, 1, 1) * set_stride + row * columns + column
        here = row * row_stride + column
        if BEFORE:
            tl.store(before_ptr + here, tl.load(own_ptr + place, mask), mask)
        if AFTER:
            tl.store(after_ptr + here, tl.load(own_ptr + place_stride + place, mask), mask)

    @triton.jit
    def _send_part_kernel(
        part_ptr, addresses_ptr, turn_ptr,
        rows, columns, row_stride, set_stride, to_row_stride, start,
        RANKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        row, column, mask = _tile(rows, columns, BLOCK_R, BLOCK_K)
        place = _turn(turn_ptr, 0, 0) * set_stride + row * to_row_stride + start + column
        values = tl.load(part_ptr + row * row_stride + column, mask)
        for to in tl.static_range(RANKS):
            tl.store(pointer_on(to, part_ptr, addresses_ptr) + place, values, mask)


def send_lines(first: Tensor | None, last: Tensor | None, room: Room, rank: int) -> None:
    """Store `first` in the room of rank - 1 as what is after its band, `last` in that of rank + 1 as before its band.

    Args:
        first, last: [R, K] of the same strides, rows contiguous; None: there is no such rank.
        room: this rank's; all ranks' are of the same size.
        rank: this one.

    Raises:
        ValueError: shapes, layout or sizes that do not fit, with what was got and expected.
    """
    some = _one_of({"last": last, "first": first}, room)
    rows, columns = some.shape
    config = LineConfig.of(columns)
    _send_lines_kernel[config.grid(rows, columns)](
        some if first is None else first, some if last is None else last, room.memory.addresses, room.turn,
        rank, rows, columns, some.stride(0), room.places(some.dtype).stride(0), spacing(some.numel(), some.dtype),
        FIRST=first is not None, LAST=last is not None, BLOCK_R=config.rows, BLOCK_K=config.columns,
        num_warps=config.warps,
    )  # fmt: skip


def take_lines(before: Tensor | None, after: Tensor | None, room: Room) -> None:
    """Write what the ranks before and after this one sent into `before` and `after`; the exchange is then over.

    Args:
        before, after: [R, K] of the same strides, rows contiguous; None: nothing is wanted there.
        room: this rank's.

    Raises:
        ValueError: as `send_lines`.
    """
    nothing = before is None and after is None  # then only the turn is counted
    some = room.own[:1, :1] if nothing else _one_of({"before": before, "after": after}, room)
    rows, columns = some.shape
    config = LineConfig.of(columns)
    own = room.places(some.dtype)
    _take_lines_kernel[config.grid(rows, columns)](
        some if before is None else before, some if after is None else after, own, room.turn,
        rows, columns, some.stride(0), own.stride(0), spacing(some.numel(), some.dtype),
        BEFORE=before is not None, AFTER=after is not None, BLOCK_R=config.rows, BLOCK_K=config.columns,
        num_warps=config.warps,
    )  # fmt: skip


def send_part(part: Tensor, room: Room, *, ranks: int, columns: int, start: int) -> None:
    """Store this rank's part of a whole [R, columns] in the rooms of the first `ranks` ranks, its own among them.

    Args:
        part: [R, K], rows contiguous: columns `start` to `start` + K of the whole.
        room: this rank's. The whole lies at the beginning of a set, where `take_lines` finds it as `before`.
        ranks: how many ranks get it.
        columns, start: see above.

    Raises:
        ValueError: as `send_lines`.
    """
    rows, own = part.shape
    _check(part, room, "part", rows * columns)
    if start < 0 or start + own > columns:
        raise ValueError(f"part: got columns {start} to {start + own}, expected within {columns}")
    config = LineConfig.of(own)
    _send_part_kernel[config.grid(rows, own)](
        part, room.memory.addresses, room.turn,
        rows, own, part.stride(0), room.places(part.dtype).stride(0), columns, start,
        RANKS=ranks, BLOCK_R=config.rows, BLOCK_K=config.columns, num_warps=config.warps,
    )  # fmt: skip


def _one_of(lines: dict[str, Tensor | None], room: Room) -> Tensor:
    """One of these lines, which are alike, named in the order of their places in a set."""
    some = next((line for line in lines.values() if line is not None), None)
    if some is None:
        raise ValueError(f"{', '.join(lines)}: got none, expected one at least")
    for place, (name, line) in enumerate(lines.items()):
        if line is None:
            continue
        _check(line, room, name, place * spacing(line.numel(), line.dtype) + line.numel())
        if (line.shape, line.stride(), line.dtype) != (some.shape, some.stride(), some.dtype):
            raise ValueError(
                f"{name}: got {line.dtype} {tuple(line.shape)}, strides {line.stride()}; expected as the other one: "
                f"{some.dtype} {tuple(some.shape)}, strides {some.stride()}"
            )
    return some


def _check(x: Tensor, room: Room, name: str, values: int) -> None:
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] != 1):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, strides {x.stride()}; expected [R, K], rows contiguous"
        )
    if room.own.dim() != 2 or room.own.shape[0] != 2 or room.own.shape[1] % ALIGNMENT:
        raise ValueError(
            f"room: got shape {tuple(room.own.shape)}, expected [2, bytes], a multiple of {ALIGNMENT}"
        )
    if room.own.shape[1] < values * x.itemsize:
        raise ValueError(
            f"room: got {room.own.shape[1]} bytes a set, expected {values * x.itemsize} for {name}"
        )
