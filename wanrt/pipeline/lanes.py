"""Lanes of work on one device: the path to the next chunk, what only the viewer waits for, and what waits for nothing.

On CUDA the main lane is a stream of high priority and the side lane one of low priority: the display decode of a
chunk runs beside the next chunk's passes, in the gaps they leave, and never in front of them. Where the mesh has
devices of its own, a third stream encodes prompts while stage 0's device waits for the mesh. On a CPU all are the
calling thread. Order is kept by events on the device; the host never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from wanrt.errors import RunError

if TYPE_CHECKING:
    import torch

WATCHDOG_S = 30.0  # no chunk takes that long once everything is warm
POLL_S = 2e-4  # the host is a chunk ahead: waking 0.2 ms late costs nothing


class Lanes(Protocol):
    """How stage 0 orders its work on a device."""

    @property
    def apart(self) -> bool:
        """Whether side work can run beside the main lane's; else all is done in the order of the calls."""
        ...

    def main(self) -> AbstractContextManager[None]:
        """The lane of the next chunk's path."""
        ...

    def join(self) -> None:
        """What the main lane is given from now on starts behind all that the side lane was given so far."""
        ...

    def mark(self) -> None:
        """Notes the main lane's place: side work starts behind it, not behind what is launched later."""
        ...

    def side(self) -> AbstractContextManager[None]:
        """The lane of display work, behind the latest mark."""
        ...

    def ahead(self) -> AbstractContextManager[None]:
        """The lane of what needs no chunk; what the main lane is given after it starts behind it."""
        ...

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, whose memory is not reused before main and side lane are done with it."""
        ...


class OneLane:
    """No lanes: everything in the order of the calls."""

    apart = False

    def main(self) -> AbstractContextManager[None]:
        """See `Lanes.main`."""
        return nullcontext()

    def join(self) -> None:
        """See `Lanes.join`."""

    def mark(self) -> None:
        """See `Lanes.mark`."""

    def side(self) -> AbstractContextManager[None]:
        """See `Lanes.side`."""
        return nullcontext()

    def ahead(self) -> AbstractContextManager[None]:
        """See `Lanes.ahead`."""
        return nullcontext()

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Lanes.share`."""
        return tensor


class CudaLanes:
    """Streams of one CUDA device.

    `apart` False: main and side lane are one stream. Collectives of two process groups on one device must come in the
    same order on every rank, which two streams cannot promise. `early`: the lane ahead is a stream of its own; on a
    device that is busy with the chunk before there is nothing to gain by it.
    """

    def __init__(self, device: torch.device, *, apart: bool = True, early: bool = False) -> None:
        import torch

        self._torch, self.apart = torch, apart
        with torch.cuda.device(device):
            self._main = torch.cuda.Stream(priority=-1)
            self._side = torch.cuda.Stream(priority=0) if apart else self._main
            self._ahead = torch.cuda.Stream(priority=-1) if early else self._main
        self._main.wait_stream(torch.cuda.current_stream(device))
        self._ahead.wait_stream(self._main)
        self._marked = self._main.record_event()
        self._aside = self._side.record_event()

    @contextmanager
    def main(self) -> Iterator[None]:
        """See `Lanes.main`."""
        with self._torch.cuda.stream(self._main):
            yield

    def join(self) -> None:
        """See `Lanes.join`."""
        self._main.wait_event(self._aside)

    def mark(self) -> None:
        """See `Lanes.mark`."""
        self._marked = self._main.record_event()

    @contextmanager
    def side(self) -> Iterator[None]:
        """See `Lanes.side`."""
        self._side.wait_event(self._marked)
        with self._torch.cuda.stream(self._side):
            yield
        self._aside = self._side.record_event()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """See `Lanes.ahead`."""
        with self._torch.cuda.stream(self._ahead):
            yield
        self._main.wait_stream(self._ahead)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Lanes.share`."""
        tensor.record_stream(self._main)
        tensor.record_stream(self._side)
        return tensor


def lanes_for(device: torch.device, *, apart: bool = True, early: bool = False) -> Lanes:
    """`CudaLanes` on CUDA, the calling thread elsewhere."""
    return CudaLanes(device, apart=apart, early=early) if device.type == "cuda" else OneLane()


class Flag:
    """A 0-dim bool tensor on its way to the host; `ready` never waits, `wait` does."""

    def __init__(self, flag: torch.Tensor) -> None:
        import torch

        self._event: torch.cuda.Event | None = None
        self._host = flag
        if flag.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    @property
    def ready(self) -> bool:
        """Whether `wait` would not wait."""
        return self._event is None or self._event.query()

    def lead(self, tensor: torch.Tensor) -> None:
        """What the current stream does with `tensor` from now on comes behind the flag; the host does not wait."""
        import torch

        if self._event is not None and tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(self._event)
            tensor.record_stream(stream)

    def wait(self, check: Callable[[], None] = lambda: None, limit_s: float = WATCHDOG_S) -> bool:
        """The flag, once the device has reached it; `check` is called meanwhile and may raise.

        Raises `RunError` when the device needs longer than `limit_s`: another rank hangs, or the device does.
        """
        deadline = time.monotonic() + limit_s
        while not self.ready:
            check()
            if time.monotonic() > deadline:
                raise RunError(
                    f"the device has not finished a chunk for {limit_s:g} s; a rank or the device hangs"
                )
            time.sleep(POLL_S)
        return bool(self._host)
