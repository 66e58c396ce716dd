"""Memory of a mesh's ranks that every rank can write to: no library moves the bytes, the kernel that makes them does.

NCCL's exchanges want their input packed and their output unpacked, and are kernels of their own. Where GPUs reach each
other's memory, the kernel that makes a number can store it where it is needed, on whichever rank, and all that is left
to do is to wait for each other. One stream of each rank uses a set of `Peers`; every rank makes the same calls.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanrt.parallel.crew import boot
from wanrt.parallel.cuda_ipc import Lent, borrow, give_back, lend
from wanrt_kernels.adaln import HAVE_TRITON
from wanrt_kernels.nvrtc import NvrtcError
from wanrt_kernels.peer_barrier import barrier
from wanrt_kernels.shared import Shared

log = logging.getLogger("wanrt.parallel")

SWITCH = "WANRT_PEERS"  # environment variable; 0: exchanges by NCCL, to compare
NCCL_SWITCH = "NCCL_P2P_DISABLE"  # environment variable, set to 1 where GPUs must not reach each other
ALIGNMENT = 16  # bytes
T = TypeVar("T")


class PeerError(RuntimeError):
    """Ranks that cannot share memory, though their GPUs reach each other's."""


class Peers(Protocol):
    """The ranks of a mesh and the memory that they share."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in shared memory, of the same shape on every rank. A joint call, which waits."""
        ...

    def addresses(self, tensor: Tensor) -> Tensor:
        """int64 `[size]` on the device: where this tensor of `empty`, or this view of it, begins on every rank.

        To be asked before a graph is captured. Raises `KeyError` for another tensor.
        """
        ...

    def barrier(self) -> None:
        """On the current stream: goes on when every rank came here, and sees what they stored before. Joint."""
        ...

    def close(self) -> None:
        """No more waiting for anybody, whoever is gone: what is under way runs to its end, its results are void."""
        ...


def share(peers: Peers, shape: Sequence[int], dtype: torch.dtype) -> Shared:
    """A tensor of `Peers.empty` that outlives the call in which it is made. Joint."""
    with torch.inference_mode(False):  # else later passes outside could not write to it
        here = peers.empty(shape, dtype)
        return Shared(here, peers.addresses(here))


class SharedBuffers:
    """Buffers of `Peers`, each as large as was ever asked for. Every rank asks for the same, in the same order.

    A buffer that became too small stays where it is: captured graphs know its address.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._buffers: dict[tuple[str, torch.dtype], Shared] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Shared:
        """The beginning of the buffer of this name and dtype as contiguous `shape`."""
        size = math.prod(shape)
        found = self._buffers.get((name, dtype))
        if found is None or found.here.numel() < size:
            found = self._buffers[name, dtype] = share(self._peers, (size,), dtype)
        return Shared(found.here[:size].view(*shape), found.addresses)


class CudaPeers:
    """`Peers` of one machine's GPUs that reach each other, each in a process of its own.

    Raises `PeerError`, on every rank, when one of them cannot share its memory or reach another's.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group, self._device = group, device
        self._shared: list[tuple[Tensor, list[int]]] = []  # allocations, and where they begin on every rank
        self._addresses: dict[int, Tensor] = {}
        self._borrowed: dict[bytes, int] = {}
        # not before the last graph that stores there is gone: all that may, holds this object
        weakref.finalize(self, _give_back, self._borrowed, device)
        self._stop = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        counts = self.empty((self.size,), torch.int64)
        stop = torch.tensor([self._stop.data_ptr()], device=device)
        self._words = torch.cat((self.addresses(counts), stop))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Peers.empty`."""
        room = torch.zeros(math.prod(shape), dtype=dtype, device=self._device)
        torch.cuda.synchronize(self._device)  # nobody may write before these zeros
        lent = self._agree(lambda: lend(room))
        addresses = self._agree(lambda: [self._borrow(rank, part, room) for rank, part in enumerate(lent)])
        self._shared.append((room, addresses[self.rank]))
        return room.view(tuple(shape))

    def _borrow(self, rank: int, lent: Lent, own: Tensor) -> int:
        if rank == self.rank:
            return own.data_ptr()
        if lent.handle not in self._borrowed:  # small tensors share an allocation
            self._borrowed[lent.handle] = borrow(lent.handle, self._device)
        return self._borrowed[lent.handle] + lent.offset

    def _agree(self, call: Callable[[], T]) -> list[T]:
        """What the call gives on every rank. Raises `PeerError` on all when it fails on one."""
        value = error = None
        try:
            value = call()
        except NvrtcError as failure:
            error = str(failure)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (value, error), group=self._group)
        for rank, (_, error) in enumerate(found):
            if error is not None:
                raise PeerError(f"rank {rank} of the mesh: {error}")
        return [value for value, _ in found]

    def addresses(self, tensor: Tensor) -> Tensor:
        """See `Peers.addresses`."""
        here = tensor.data_ptr()
        if here not in self._addresses:
            self._addresses[here] = torch.tensor(self._find(here), dtype=torch.int64, device=self._device)
        return self._addresses[here]

    def _find(self, here: int) -> list[int]:
        for room, addresses in self._shared:
            offset = here - room.data_ptr()
            if 0 <= offset < room.numel() * room.element_size():
                assert offset % ALIGNMENT == 0, (
                    f"{offset} bytes into shared memory: kernels store {ALIGNMENT} at once"
                )
                return [address + offset for address in addresses]
        raise KeyError(f"no shared memory at {here:#x}")

    def barrier(self) -> None:
        """See `Peers.barrier`. A kernel of the current stream; nothing waits on the host."""
        barrier(self._words, self._count, self.rank)

    def close(self) -> None:
        """See `Peers.close`."""
        self._stop.fill_(1)


def open_peers(group: ProcessGroup, device: torch.device, against: str | None = None) -> Peers | None:
    """The peers of `group`, or None where they cannot share memory; the log says why. A joint call.

    against: why this rank does without, in a few words, for the log.
    """
    if device.type != "cuda" or group.size() == 1:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    abouts: list[Any] = [None] * group.size()
    dist.all_gather_object(abouts, (boot(), index, against or _switched_off()), group=group)
    reason = why_apart(abouts, torch.cuda.can_device_access_peer)
    if reason is None:
        try:
            peers = CudaPeers(group, device)
        except PeerError as error:
            reason = str(error)
        else:
            log.info("exchanges: kernels store on other ranks' GPUs themselves")
            return peers
    log.info("exchanges: by NCCL (%s)", reason)
    return None


def why_apart(
    ranks: Sequence[tuple[str, int, str | None]], reaches: Callable[[int, int], bool]
) -> str | None:
    """Why these ranks cannot write to each other's memory, in a few words; None: they can.

    ranks: (start of the machine, number of the device there, what is against it on that rank). reaches: whether the
    first device of this machine can map the second one's memory.
    """
    for _, _, against in ranks:
        if against is not None:
            return against
    if len({machine for machine, _, _ in ranks}) > 1:
        return "the ranks are on several machines"
    for (_, a, _), (_, b, _) in itertools.permutations(ranks, 2):
        if a != b and not reaches(a, b):
            return f"cuda:{a} does not reach the memory of cuda:{b}"
    return None


def _give_back(borrowed: dict[bytes, int], device: torch.device) -> None:
    for address in borrowed.values():
        give_back(address, device)


def _switched_off() -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if os.environ.get(NCCL_SWITCH, "0") != "0":
        return f"{NCCL_SWITCH} is set"
    if not HAVE_TRITON:
        return "Triton is not installed"
    return None
