"""One function as a CUDA graph: a replay costs the host one launch, however many the function makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class CapturedCall(Generic[T]):
    """`function`, captured on a stream of its own after `warm_up` runs.

    Libraries choose kernels and allocate workspaces in the first runs; the capture must see neither.

    Args:
        function: reads and writes memory whose address stays, allocates only through PyTorch, waits for no device.
        device: a CUDA device.
        warm_up: runs before the capture.
        pool: the memory of another graph, whose replays never overlap with this one's; None: memory of its own.

    Attributes:
        result: what `function` gave, at the address that every replay writes to, of any graph of the pool.
    """

    def __init__(
        self, function: Callable[[], T], device: torch.device, *, warm_up: int, pool: Any = None
    ) -> None:
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                function()
        side.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the panel asks the driver for free memory from its own thread meanwhile
        with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.result = function()
        current.wait_stream(side)

    def replay(self) -> T:
        """Runs it again on the current stream. The host does not wait."""
        self._graph.replay()
        return self.result

    def pool(self) -> Any:
        """Its memory, for another to share."""
        return self._graph.pool()

    def close(self) -> None:
        """Gives the graph up, whoever still holds this object: NCCL waits for those that use its communicator."""
        self._graph.reset()
