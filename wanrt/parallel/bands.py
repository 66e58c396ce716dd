"""A picture cut into bands, one a rank: who holds which latent rows (or columns), and how neighbours exchange lines.

A rank's activations are its own lines and, on each side where it has a neighbour, one halo line: a copy of the
neighbour's outermost line. At the edge of the picture there is none; zero padding stands there as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanrt.parallel.vae_axis import Axis, axis_of


@dataclass(frozen=True)
class Band:
    """Band `index` of a picture: latent lines `bounds[index]` to `bounds[index + 1]` along `axis`."""

    axis: Axis
    bounds: tuple[int, ...]
    index: int

    @classmethod
    def of(cls, height: int, width: int, parts: int, index: int) -> Band:
        """Cut a latent of `height` x `width` into `parts`, as even as whole lines allow.

        Along `axis_of`. Raises `UsageError` for more parts than lines.
        """
        return cls.along(axis_of(height, width, parts), height, width, parts, index)

    @classmethod
    def along(cls, axis: Axis, height: int, width: int, parts: int, index: int) -> Band:
        """As `of`, along this axis."""
        lines = height if axis is Axis.ROWS else width
        return cls(axis, tuple(i * lines // parts for i in range(parts + 1)), index)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Latent lines of every band."""
        return tuple(b - a for a, b in pairwise(self.bounds))

    @property
    def before(self) -> int:
        """Halo lines in front: 1, or 0 at the edge of the picture."""
        return int(self.index > 0)

    @property
    def after(self) -> int:
        """Halo lines behind."""
        return int(self.index + 2 < len(self.bounds))

    def part(self, x: Tensor, dim: int, scale: int = 1) -> Tensor:
        """This band's own lines of a whole `x` that has `scale` lines for each latent line. A view."""
        start, stop = self.bounds[self.index], self.bounds[self.index + 1]
        return x.narrow(dim, start * scale, (stop - start) * scale)

    def part_with_halo(self, x: Tensor, dim: int) -> Tensor:
        """As `part` for latent lines, with the halo lines. A view."""
        start, stop = self.bounds[self.index] - self.before, self.bounds[self.index + 1] + self.after
        return x.narrow(dim, start, stop - start)

    def inner(self, x: Tensor, dim: int) -> Tensor:
        """`x` without its halo lines. A view."""
        return x.narrow(dim, self.before, x.shape[dim] - self.before - self.after)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of this band of a latent of `height` x `width`."""
        own = self.lengths[self.index]
        return (own, width) if self.axis is Axis.ROWS else (height, own)


class Neighbours(Protocol):
    """How bands reach each other. Every rank of a split makes the same calls in the same order."""

    def swap(
        self,
        first: Tensor | None,
        last: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        dim: int,
    ) -> None:
        """Give the band before mine my `first` line and the one behind it my `last`; theirs are put in
        `before` and `after`.

        None: there is no such band. Lines are views of length 1 along `dim`.
        """
        ...

    def gather(self, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
        """Every band's `own` side by side along `dim`, where they have these lengths."""
        ...

    def collect(self, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor | None:
        """As `gather`, for the first rank; None on the others."""
        ...


@dataclass(frozen=True)
class GroupNeighbours:
    """The bands are the ranks of a process group, in its order."""

    group: ProcessGroup

    def swap(
        self,
        first: Tensor | None,
        last: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        dim: int,
    ) -> None:
        """See `Neighbours.swap`. On CUDA nothing waits but the current stream."""
        rank = self.group.rank()
        got: list[tuple[Tensor, Tensor]] = []
        operations: list[dist.P2POp] = []
        for line, into, other in ((first, before, rank - 1), (last, after, rank + 1)):
            if line is None or into is None:
                continue
            peer = dist.get_global_rank(self.group, other)
            sent = line.contiguous()
            received = torch.empty_like(sent)
            operations.append(dist.P2POp(dist.isend, sent, peer, self.group))
            operations.append(dist.P2POp(dist.irecv, received, peer, self.group))
            got.append((into, received))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for into, received in got:
            into.copy_(received)

    def gather(self, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
        """See `Neighbours.gather`. Shorter bands are padded to the longest, as an all-gather wants equal parts."""
        padded = _padded(own, max(lengths), dim)
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return _joined(parts, lengths, dim)

    def collect(self, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor | None:
        """See `Neighbours.collect`."""
        padded = _padded(own, max(lengths), dim)
        parts = [torch.empty_like(padded) for _ in lengths] if self.group.rank() == 0 else None
        dist.gather(padded, parts, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return None if parts is None else _joined(parts, lengths, dim)


def _padded(own: Tensor, length: int, dim: int) -> Tensor:
    shape = list(own.shape)
    shape[dim] = length
    padded = own.new_zeros(shape)
    padded.narrow(dim, 0, own.shape[dim]).copy_(own)
    return padded


def _joined(parts: Sequence[Tensor], lengths: Sequence[int], dim: int) -> Tensor:
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim=dim)


@dataclass(frozen=True)
class Seam:
    """One band's edges in tensors whose lines run along `dim`."""

    band: Band
    neighbours: Neighbours
    dim: int

    def refresh(self, x: Tensor) -> Tensor:
        """Overwrite the halo lines of `x` by what the neighbours have there. In place."""
        before, after, behind = self.band.before, self.band.after, x.shape[self.dim] - 1
        first, last = x.narrow(self.dim, before, 1), x.narrow(self.dim, behind - after, 1)
        self.neighbours.swap(
            first if before else None,
            last if after else None,
            x.narrow(self.dim, 0, 1) if before else None,
            x.narrow(self.dim, behind, 1) if after else None,
            self.dim,
        )
        return x

    def extend(self, own: Tensor) -> Tensor:
        """Add the halo lines to a band's own lines."""
        shape = list(own.shape)
        shape[self.dim] += self.band.before + self.band.after
        x = own.new_empty(shape)
        self.inner(x).copy_(own)
        return self.refresh(x)

    def inner(self, x: Tensor) -> Tensor:
        """`x` without its halo lines. A view."""
        return self.band.inner(x, self.dim)

    def without_first(self, x: Tensor) -> Tensor:
        """`x` without the halo line in front. A view."""
        return x.narrow(self.dim, self.band.before, x.shape[self.dim] - self.band.before)

    def whole(self, x: Tensor) -> Tensor:
        """The whole picture's map of latent lines, on every rank."""
        return self.neighbours.gather(self.inner(x), self.band.lengths, self.dim)

    def cut(self, whole: Tensor) -> Tensor:
        """This band's latent lines and halo lines of a whole map. A view."""
        return self.band.part_with_halo(whole, self.dim)
