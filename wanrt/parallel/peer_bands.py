"""Bands that reach each other's memory: exchanges are kernels that store there. See `wanrt_kernels.peer_lines`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wanrt.parallel.peers import Peers, share
from wanrt_kernels.peer_lines import ALIGNMENT, Room, send_lines, send_part, spacing, take_lines


class PeerNeighbours:
    """`Neighbours` whose bands are the ranks of `peers`, in their order. Used by one stream.

    The rooms for what arrives are made when first needed, a joint call, and kept: captured graphs use them. So every
    call is made once before it is captured.

    Args:
        peers: of the split.
        device: of this rank.
    """

    def __init__(self, peers: Peers, device: torch.device) -> None:
        self._peers = peers
        self._turn = torch.zeros(2, dtype=torch.int64, device=device)
        self._rooms: list[Room] = []

    def swap(
        self,
        first: Tensor | None,
        last: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        dim: int,
    ) -> None:
        """See `Neighbours.swap`. In [T, H, W, C] without gaps nothing is packed, whichever the axis."""
        some = first if first is not None else last
        assert some is not None, "a split has two bands at least"
        room = self._room(2 * spacing(some.numel(), some.dtype), some.dtype)
        send_lines(_rows(first, dim), _rows(last, dim), room, self._peers.rank)
        self._peers.barrier()
        found = _rows(before, dim), _rows(after, dim)
        take_lines(*found, room)
        for rows, line in zip(found, (before, after), strict=True):
            if rows is not None and line is not None and rows.data_ptr() != line.data_ptr():
                line.copy_(rows.view(line.shape))

    def gather(self, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
        """See `Neighbours.gather`."""
        whole = self._exchange(own, lengths, dim, self._peers.size)
        assert whole is not None
        return whole

    def collect(self, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor | None:
        """See `Neighbours.collect`."""
        return self._exchange(own, lengths, dim, 1)

    def _exchange(self, own: Tensor, lengths: Sequence[int], dim: int, ranks: int) -> Tensor | None:
        """Every band's `own` side by side, on the first `ranks` ranks."""
        shape, rank = list(own.shape), self._peers.rank
        shape[dim] = sum(lengths)
        part = _rows(own, dim)
        assert part is not None
        line = part.shape[1] // lengths[rank]  # values that a row has of one line
        room = self._room(math.prod(shape), own.dtype)
        send_part(part, room, ranks=ranks, columns=line * sum(lengths), start=line * sum(lengths[:rank]))
        self._peers.barrier()
        whole = own.new_empty(shape) if rank < ranks else None
        take_lines(None if whole is None else whole.view(1, -1), None, room)
        return whole

    def _room(self, values: int, dtype: torch.dtype) -> Room:
        """A room whose sets have so many values. A larger one than ever before is a joint call.

        Its two sets do not move with what is exchanged: they must not overlap from one exchange to the next.
        """
        size = -(-values * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        room = next((room for room in self._rooms if room.own.shape[1] >= size), None)
        if room is None:
            room = Room(share(self._peers, (2, size), torch.uint8), self._turn)
            self._rooms.append(room)
        return room


def _rows(x: Tensor | None, dim: int) -> Tensor | None:
    """`x` as [values before `dim`, values from `dim` on], rows contiguous: a view where its layout has one."""
    if x is None:
        return None
    dim %= x.dim()
    rows = x.reshape(math.prod(x.shape[:dim]), math.prod(x.shape[dim:]))
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
