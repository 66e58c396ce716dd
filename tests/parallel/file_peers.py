"""`Peers` for tests on a CPU: shared memory is files that every rank maps."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist


class FilePeers:
    """See `wanrt.parallel.peers.Peers`. `folder`: the same empty one on every rank."""

    def __init__(self, group, folder):
        self.rank, self.size = group.rank(), group.size()
        self._group, self._folder = group, Path(folder)
        self._shared = []

    def empty(self, shape, dtype):
        count = math.prod(shape)
        paths = [str(self._folder / f"{rank}-{len(self._shared)}") for rank in range(self.size)]
        own = torch.from_file(paths[self.rank], shared=True, size=count, dtype=dtype).zero_()
        self.barrier()
        mapped = [
            own if rank == self.rank else torch.from_file(path, shared=True, size=count, dtype=dtype)
            for rank, path in enumerate(paths)
        ]
        self._shared.append(mapped)
        self.barrier()
        return own.view(tuple(shape))

    def addresses(self, tensor):
        here = tensor.data_ptr()
        for mapped in self._shared:
            own = mapped[self.rank]
            offset = here - own.data_ptr()
            if 0 <= offset < own.numel() * own.element_size():
                return torch.tensor([other.data_ptr() + offset for other in mapped])
        raise KeyError(here)

    def barrier(self):
        dist.barrier(self._group)

    def close(self):
        pass
