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
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from wanrt.parallel.crew import boot
from wanrt_kernels.adaln import HAVE_TRITON
from wanrt_kernels.peer_barrier import barrier

log = logging.getLogger("wanrt.parallel")

SWITCH = "WANRT_PEERS"  # environment variable; 0: exchanges by NCCL, to compare
NCCL_SWITCH = "NCCL_P2P_DISABLE"  # environment variable, set to 1 where GPUs must not reach each other
ALIGNMENT = 16  # bytes


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


class PeerRoom:
    """Buffers in which ranks hand each other what a pass needs now: made by its first pass, kept, and used again."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._rooms: dict[str, list[Tensor]] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer of this name, as large as `shape`. A larger size than ever before is a joint call.

        Smaller buffers stay where they are: captured graphs may use them.
        """
        rooms = self._rooms.setdefault(name, [])
        count = math.prod(shape)
        room = next((room for room in rooms if room.dtype == dtype and room.numel() >= count), None)
        if room is None:
            room = self.peers.empty((count,), dtype)
            rooms.append(room)
        return room[:count].view(tuple(shape))


class SymmetricPeers:
    """`Peers` of one machine's GPUs that reach each other, by PyTorch's symmetric memory.

    name: the same on every rank, and never used before. Under a group's own name PyTorch would remember the store of a
    group of that name that this process has left.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, name: str) -> None:
        from torch.distributed import distributed_c10d as c10d
        from torch.distributed._symmetric_memory import _SymmetricMemory

        self.rank, self.size = group.rank(), group.size()
        self._name, self._device = name, device
        store = dist.PrefixStore(name, c10d._get_process_group_store(group))
        _SymmetricMemory.set_group_info(name, self.rank, self.size, store)
        self._shared: list[tuple[Tensor, Any]] = []  # allocations, and PyTorch's handles for them
        self._addresses: dict[int, Tensor] = {}
        self._stop = torch.zeros(1, dtype=torch.int64).pin_memory()
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        counts = self.empty((self.size,), torch.int64)
        stop = torch.tensor([self._stop.data_ptr()], device=device)
        self._words = torch.cat((self.addresses(counts), stop))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Peers.empty`."""
        from torch.distributed._symmetric_memory import _SymmetricMemory, empty

        room = empty(math.prod(shape), dtype=dtype, device=self._device).zero_()
        torch.cuda.synchronize(self._device)  # nobody may write before these zeros
        self._shared.append((room, _SymmetricMemory.rendezvous(room, self._name)))
        return room.view(tuple(shape))

    def addresses(self, tensor: Tensor) -> Tensor:
        """See `Peers.addresses`."""
        here = tensor.data_ptr()
        if here not in self._addresses:
            self._addresses[here] = torch.tensor(self._find(here), dtype=torch.int64, device=self._device)
        return self._addresses[here]

    def _find(self, here: int) -> list[int]:
        for room, handle in self._shared:
            offset = here - room.data_ptr()
            if 0 <= offset < room.numel() * room.element_size():
                assert offset % ALIGNMENT == 0, (
                    f"{offset} bytes into shared memory: kernels store {ALIGNMENT} at a time"
                )
                return [address + offset for address in handle.buffer_ptrs]
        raise KeyError(f"no shared memory at {here:#x}")

    def barrier(self) -> None:
        """See `Peers.barrier`. A kernel of the current stream; nothing waits on the host."""
        barrier(self._words, self._count, self.rank)

    def close(self) -> None:
        """See `Peers.close`."""
        self._stop.fill_(1)


def open_peers(group: ProcessGroup, device: torch.device) -> Peers | None:
    """The peers of `group`, or None where they cannot reach each other; the log says why. A joint call."""
    if device.type != "cuda" or group.size() == 1:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    abouts: list[Any] = [None] * group.size()
    dist.all_gather_object(abouts, (boot(), index, _switched_off(), uuid.uuid4().hex), group=group)
    reason = why_apart([about[:3] for about in abouts], torch.cuda.can_device_access_peer)
    if reason is None:
        log.info("exchanges: kernels store on other ranks' GPUs themselves")
        return SymmetricPeers(group, device, f"wanrt-{abouts[0][3]}")
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


def _switched_off() -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if os.environ.get(NCCL_SWITCH, "0") != "0":
        return f"{NCCL_SWITCH} is set"
    if not HAVE_TRITON:
        return "Triton is not installed"
    return None
