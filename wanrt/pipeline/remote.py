"""A mesh of several ranks, as stage 0 sees it and as its ranks live it.

Commands go through the team's pipes (a header a chunk, a few hundred bytes), tensors through torch.distributed:
a changed embedding and then the anchor from stage 0 to all ranks, a chunk's latents from the mesh's first rank back.
Stage 0 is rank 0; without PP1 it is also the mesh's first rank, and latents never travel.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

from wanrt.errors import RunError
from wanrt.parallel.member import words_of
from wanrt.parallel.team import Spans, Team, answering
from wanrt.pipeline.codec import VaePart
from wanrt.pipeline.envelope import ChunkRequest, ChunkResult, Control, all_finite
from wanrt.pipeline.heap import settled_heap
from wanrt.pipeline.mesh import Mesh, refuse_under_way
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

log = logging.getLogger("wanrt.pipeline")

STAGE0 = 0
IN_PASSING_S = 0.2  # how long ranks that wait in an exchange may take to notice the end
WATCHDOG_S = 30.0  # how long an exchange may take once all ranks are warm
LEAVING_S = 10.0  # how long the libraries may take to give a process group up


class Closing(Protocol):
    """Something whose CUDA graphs hold communicators."""

    def close(self) -> None:
        """Gives them up."""
        ...


@dataclass(frozen=True)
class Header:
    """A `ChunkRequest` without its tensors: what a rank must know to receive them."""

    chunk: int
    anchor: bool
    control: Control | None

    @classmethod
    def of(cls, request: ChunkRequest) -> Header:
        """The header of a request."""
        return cls(request.chunk, request.anchor is not None, request.control)


@dataclass(frozen=True)
class TextHeader:
    """What a rank must know to receive the prompt of `chunk` and those after it."""

    chunk: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Link:
    """The tensors' way. `shape`: of a chunk's latents; `mesh0`: global rank of the mesh's first rank.

    group: stage 0 and the mesh; None: that is everybody.
    """

    device: torch.device
    shape: tuple[int, int, int, int, int]
    mesh0: int
    group: ProcessGroup | None = None

    def share_down(self, header: Header, request: ChunkRequest | None) -> ChunkRequest:
        """Broadcasts a request's anchor from stage 0, which passes it; every rank returns the request whole."""
        anchor = None
        if header.anchor:
            b, c, _, h, w = self.shape
            anchor = self._broadcast(None if request is None else request.anchor, (b, c, 1, h, w))
        return ChunkRequest(header.chunk, anchor, header.control)

    def share_text(self, header: TextHeader, embedding: torch.Tensor | None) -> torch.Tensor:
        """Broadcasts an embedding from stage 0, which passes it; every rank returns it."""
        return self._broadcast(embedding, header.shape, header.dtype)

    def rehearse(self) -> None:
        """One exchange each way, by all who have this link: NCCL connects in the first, which takes it 0.2 s."""
        import torch
        import torch.distributed as dist

        nothing = torch.zeros(self.shape, device=self.device)
        self._broadcast(nothing, self.shape)
        if self.mesh0 != STAGE0 and dist.get_rank() == STAGE0:
            self.receive_up()
        elif self.mesh0 != STAGE0 and dist.get_rank() == self.mesh0:
            self.send_up(nothing)

    def send_up(self, latents: torch.Tensor) -> None:
        """Latents from the mesh's first rank to stage 0."""
        import torch.distributed as dist

        dist.send(latents.contiguous(), dst=STAGE0)

    def receive_up(self) -> torch.Tensor:
        """Latents at stage 0; on CUDA the call returns at once and the current stream waits."""
        import torch
        import torch.distributed as dist

        latents = torch.empty(self.shape, device=self.device)
        dist.recv(latents, src=self.mesh0)
        return latents

    def settle(self) -> None:
        """Waits until the device has done all it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _broadcast(
        self, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        import torch
        import torch.distributed as dist

        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype or torch.float32, device=self.device)
        tensor = tensor.to(self.device).contiguous()
        dist.broadcast(tensor, src=STAGE0, group=self.group)
        return tensor


class RankedMesh:
    """Stage 0's `MeshHandle` on a mesh of rank processes.

    `local`: the mesh's part in this process, if it has one; `names`: of the other ranks of the mesh; `parts`: what
    this process takes part with, closed before the group is left.
    """

    def __init__(
        self,
        team: Team,
        link: Link,
        local: Mesh | None,
        names: frozenset[str],
        *,
        launch_on_submit: bool,
        parts: Iterable[Closing] = (),
        cleanup: Callable[[], None] = lambda: None,
    ) -> None:
        self._team, self._link, self._local, self._cleanup = team, link, local, cleanup
        self._parts = parts
        self._names, self._launch_on_submit = names, launch_on_submit
        self._request: ChunkRequest | None = None
        self._result: ChunkResult | None = None
        self._under_way = False  # the ranks make a chunk, or wait for this process in the middle of one

    @property
    def launches_here(self) -> bool:
        """See `MeshHandle.launches_here`."""
        return self._launch_on_submit and self._local is not None

    def set_text(self, chunk: int, embedding: torch.Tensor) -> None:
        """Hands a prompt to all ranks, which take it in while stage 0 makes the anchor."""
        refuse_under_way(self._request, f"the prompt of chunk {chunk}")
        header = TextHeader(chunk, tuple(embedding.shape), embedding.dtype)
        self._tell(header)
        with answering(self._team, "mesh: the ranks did not take the prompt"):
            whole = self._link.share_text(header, embedding)
            if self._local is not None:
                self._local.set_text(chunk, whole)
        self._under_way = False

    def submit(self, request: ChunkRequest) -> None:
        """Hands a request to all ranks.

        A mesh that shares this process's CPU starts in `receive`, as in `InProcessMesh`: its other ranks would
        only wait for this one.
        """
        refuse_under_way(self._request, f"chunk {request.chunk}")
        self._request = request
        if self._local is None or self._launch_on_submit:
            self._launch(request)

    def receive(self) -> ChunkResult:
        """The chunk under way."""
        if self._request is None:
            raise RunError("mesh: nothing is under way; submit a chunk first")
        request, self._request = self._request, None
        if self._local is None:
            with answering(self._team, "mesh: no latents came back"):
                latents = self._link.receive_up()
            self._under_way = False
            return ChunkResult(request.chunk, latents, all_finite(latents))
        if not self._launch_on_submit:
            self._launch(request)
        result, self._result = self._result, None
        assert result is not None
        self._under_way = False
        return result

    def check(self) -> None:
        """Raises `RunError` when a rank has failed or died."""
        self._team.check()

    def close(self) -> None:
        """Ends the ranks and the process group. Ranks in the middle of a chunk are not waited for."""
        self._team.close(IN_PASSING_S if self._under_way else None)
        leave_group(self._parts, at_once=self._under_way)
        self._cleanup()

    def _tell(self, header: Header | TextHeader) -> None:
        """The ranks' next command: they wait in its exchange until this process joins it."""
        self._team.check()
        self._under_way = True
        self._team.send(header, self._names)

    def _launch(self, request: ChunkRequest) -> None:
        header = Header.of(request)
        self._tell(header)
        with answering(self._team, "mesh: the ranks did not take the request"):
            whole = self._link.share_down(header, request)
            if self._local is not None:
                self._result = self._local.run(whole)
                if self._launch_on_submit:
                    self._local.draw_ahead(request.chunk + 1)


@dataclass(frozen=True)
class Roles:
    """What a rank takes part in. `answers`: it sends the mesh's latents back."""

    mesh: Mesh | None
    vae: VaePart | None
    answers: bool

    @property
    def parts(self) -> tuple[Closing, ...]:
        """Those there are."""
        return tuple(part for part in (self.mesh, self.vae) if part is not None)


def serve(roles: Roles, link: Link, pipe: Connection, recorder: Recorder) -> None:
    """A rank's life: command after command, in stage 0's order, until the pipe says None."""
    with settled_heap():
        _follow(roles, link, pipe, recorder)
    link.settle()
    pipe.send(Spans(recorder.drain()))


def _follow(roles: Roles, link: Link, pipe: Connection, recorder: Recorder) -> None:
    while (command := pipe.recv()) is not None:
        if isinstance(command, Header):
            assert roles.mesh is not None, "headers go to the mesh"
            _make_chunk(roles.mesh, link, command, answers=roles.answers)
        elif isinstance(command, TextHeader):
            assert roles.mesh is not None, "prompts go to the mesh"
            roles.mesh.set_text(command.chunk, link.share_text(command, None))
        else:
            assert roles.vae is not None, "VAE commands go to the VAE's ranks"
            roles.vae.follow(command, recorder)
        if batch := recorder.drain():
            pipe.send(Spans(batch))


def _make_chunk(mesh: Mesh, link: Link, header: Header, *, answers: bool) -> None:
    result = mesh.run(link.share_down(header, None))
    if answers:
        link.send_up(result.latents)
    mesh.draw_ahead(result.chunk + 1)


def join_group(
    backend: str, store: str, rank: int, size: int, timeout_s: float, device: torch.device, *, loopback: bool
) -> None:
    """Makes this process rank `rank` of `size`.

    store: where all ranks of this run, and nobody else, meet: `file:///PATH` of this machine, or `tcp://HOST:PORT` of
    a store that is there already. loopback: all ranks are on this machine.
    """
    import datetime
    import os

    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_s)
    if store.startswith("tcp://"):
        host, _, port = store.removeprefix("tcp://").rpartition(":")
        met: dict[str, Any] = {
            "store": dist.TCPStore(host, int(port), None, is_master=False, timeout=timeout)
        }
    else:
        met = {"init_method": store}
    if backend == "gloo" and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may not resolve
    dist.init_process_group(
        backend,
        **met,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )


def leave_group(parts: Iterable[Closing] = (), *, at_once: bool = False) -> None:
    """Leaves the process group, if there is one, without waiting for anybody.

    parts: closed first. NCCL does not give up a communicator before every CUDA graph that uses it is destroyed, and
    waits for that without end (NVIDIA/nccl, src/init.cc, commDestroySync). at_once: exchanges may be under way that
    nobody will ever answer; they are broken off.
    """
    import torch.distributed as dist

    def close() -> None:
        for part in parts:
            part.close()

    def leave() -> None:
        if dist.is_initialized():
            _leave(at_once)

    def in_turn() -> None:
        close()
        leave()

    # Kernels that wait for a rank that is gone end when NCCL is told to break off, and only then can their graphs be
    # given up; NCCL for its part waits for the graphs. So it is done at once, or else in turn.
    _within_limit(*((close, leave) if at_once else (in_turn,)))


def _within_limit(*steps: Callable[[], None]) -> None:
    """All steps side by side, `LEAVING_S` at most.

    A library that waits for what no longer comes must not keep a finished video's process from ending.
    """
    threads = [threading.Thread(target=_tried, args=(step,), daemon=True) for step in steps]
    deadline = time.monotonic() + LEAVING_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        log.warning("the process group was not left within %g s; going on without", LEAVING_S)


def _tried(step: Callable[[], None]) -> None:
    """A device that failed fails here once more: a word in the log, for what failed first has been said."""
    try:
        step()
    except Exception as error:
        log.warning("while leaving the process group: %s", words_of(error))


def _leave(at_once: bool) -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if at_once and dist.get_backend() == dist.Backend.NCCL:
        c10d._abort_process_group()
    else:
        dist.destroy_process_group()
