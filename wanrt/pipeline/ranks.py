"""A pipeline over several devices: this process is stage 0, and starts the other ranks or takes those of its crew.

Rank r of one machine runs on device r (a CUDA device each, or a share of the CPU's cores), a rank that torchrun
started on the device of its LOCAL_RANK. Without PP1 this process is also the mesh's first rank. All ranks load at the
same time, each reading only its slices of the checkpoint.

Where the topology is known from the start, the processes are started before this one imports torch (`reserve_for`), so
that the imports and the devices' contexts, seconds each, are had once and not once after the other.
"""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.parallel.crew import Crew, Recruit, boot
from wanrt.parallel.reserve import Reserve
from wanrt.parallel.team import Loading, Member, Ready, Spans, Team, answering
from wanrt.pipeline.build import (
    CacheShare,
    Tuning,
    Wiring,
    join_stage0,
    local_codec,
    make_mesh,
    make_recorder,
    mesh_settings,
    rehearse,
    topology_of,
)
from wanrt.pipeline.codec import Codec, StreamingVae, TeamCodec, VaePart
from wanrt.pipeline.lanes import Lanes, lanes_for
from wanrt.pipeline.mesh import Mesh
from wanrt.pipeline.progress import timed
from wanrt.pipeline.remote import (
    STAGE0,
    WATCHDOG_S,
    Closing,
    Link,
    RankedMesh,
    Roles,
    join_group,
    leave_group,
    serve,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from wanrt.parallel.peers import Peers
    from wanrt.parallel.topology import Rank, Topology
    from wanrt.pipeline.loop import Pipeline
    from wanrt.pipeline.models import Stage0Models
    from wanrt.script import RenderJob
    from wanrt.weights.registry import ModelFiles

log = logging.getLogger("wanrt.pipeline")

COMMUNICATOR = "communicator"  # what joining the process groups is called while loading


@dataclass(frozen=True)
class Assignment:
    """What a rank is told at its start; picklable."""

    job: RenderJob
    files: ModelFiles | None
    topology: Topology
    rank: int
    name: str
    device: str
    store: str
    tuning: Tuning
    started_ns: int
    watchdog_s: float
    one_machine: bool = True

    @property
    def backend(self) -> str:
        """Of torch.distributed."""
        return "nccl" if self.device.startswith("cuda") else "gloo"


def reserve_for(job: RenderJob, crew: Crew | None = None, *, context: bool = True) -> Reserve:
    """The processes that a job will need, on their way before torch is imported here; whoever calls it closes it.

    context: False leaves the devices alone, which somebody else still uses. None are started for ranks that torchrun
    started, and for `auto`, which asks the devices first. Raises `UsageError` for a topology that the model cannot
    take.
    """
    reserve = Reserve(partial(prepare, device=job.device if context else "cpu"))
    if crew is None and job.topology != "auto":
        reserve.fill(topology_of(job).devices - 1)
    return reserve


def prepare(number: int, device: str) -> None:
    """What a rank's process does before it knows its part: imports, and the context of the CUDA device that it will
    most likely get, that of its number.
    """
    from wanrt.pipeline.devices import wait_passively

    wait_passively()
    import torch
    import torch.distributed

    import wanrt.pipeline.models
    import wanrt.weights.loading
    import wanrt.weights.random  # noqa: F401 (with the modules that these bring)

    if device != "cpu" and torch.cuda.is_available() and number < torch.cuda.device_count():
        torch.cuda.set_device(number)
        torch.zeros(1, device="cuda")


def build_ranked(
    job: RenderJob,
    files: ModelFiles | None,
    device: torch.device,
    topology: Topology,
    wiring: Wiring,
    tuning: Tuning,
) -> Pipeline:
    """Gives the ranks their parts, loads stage 0 meanwhile, and joins the two.

    Raises `UsageError` for more ranks than devices, `RunError` naming the rank that failed.
    """
    if wiring.crew is not None:
        return _build_joined(job, files, device, topology, wiring, tuning, wiring.crew)
    check_devices(topology, device)
    folder = Path(tempfile.mkdtemp(prefix="wanrt-"))
    plans = [
        Assignment(
            job, files, topology, rank.rank, rank.name, device_of(device, rank.rank), f"file://{folder / 'store'}",
            tuning, wiring.recorder.started_ns, WATCHDOG_S,
        )
        for rank in topology.ranks()
    ]  # fmt: skip
    team = Team(_Listener(wiring).heard)
    with _undone(team, partial(shutil.rmtree, folder, ignore_errors=True)) as own:
        reserve = wiring.reserve or Reserve(partial(prepare, device=str(device)))
        team.start([Member(plan.name, plan.device, plan) for plan in plans[1:]], work, reserve)
        return _join(plans[STAGE0], device, team, wiring, own)


def _build_joined(
    job: RenderJob,
    files: ModelFiles | None,
    device: torch.device,
    topology: Topology,
    wiring: Wiring,
    tuning: Tuning,
    crew: Crew,
) -> Pipeline:
    """As `build_ranked`, with ranks that torchrun started."""
    recruits = crew.meet(wiring.check)
    check_crew(topology, device, recruits.values())
    store, here = crew.new_store(), socket.gethostname()
    lone = all(recruit.about.boot == boot() for recruit in recruits.values())
    plans = [
        Assignment(
            job, files, topology, rank.rank, rank.name,
            device_of(device, recruits[rank.rank].about.local_rank if rank.rank else 0), store,
            tuning, wiring.recorder.started_ns, WATCHDOG_S, lone,
        )
        for rank in topology.ranks()
    ]  # fmt: skip
    names = {plan.name: recruits[plan.rank] for plan in plans[1:]}
    offsets = {name: recruit.offset_ns for name, recruit in names.items()}
    places = {
        name: "" if recruit.about.host == here else f" on {recruit.about.host}"
        for name, recruit in names.items()
    }
    team = Team(_Listener(wiring, offsets).heard)
    with _undone(team, crew.close_stores) as own:
        team.join(
            (Member(plan.name, plan.device + places[plan.name], plan), names[plan.name].connection)
            for plan in plans[1:]
        )
        return _join(plans[STAGE0], device, team, wiring, own)


@dataclass(frozen=True)
class _Own:
    """What this process must give up when the pipeline ends: its parts, and what `cleanup` does."""

    cleanup: Callable[[], None]
    parts: list[Closing] = field(default_factory=list)


@contextmanager
def _undone(team: Team, cleanup: Callable[[], None]) -> Iterator[_Own]:
    """Ends what was begun when building a pipeline fails; gives what its own end has to do."""
    own = _Own(cleanup)
    try:
        yield own
    except BaseException:
        team.close()
        leave_group(own.parts, at_once=True)
        cleanup()
        raise


def check_crew(topology: Topology, device: torch.device, recruits: Iterable[Recruit]) -> None:
    """Raises `UsageError` for a rank whose node has no CUDA device of its LOCAL_RANK."""
    if device.type != "cuda":
        return
    for recruit in recruits:
        about = recruit.about
        if about.local_rank >= about.devices:
            raise UsageError(
                f"topology {topology}: rank {about.rank} has LOCAL_RANK {about.local_rank}, expected below "
                f"{about.devices}, the CUDA devices of {about.host}; start fewer ranks there"
            )


def check_devices(topology: Topology, device: torch.device) -> None:
    """Raises `UsageError` when there are fewer CUDA devices than ranks. A CPU takes any number."""
    if device.type != "cuda":
        return
    import torch

    if device.index not in (None, 0):
        raise UsageError(
            f"device {device}: a topology of several devices begins at cuda:0; set CUDA_VISIBLE_DEVICES"
        )
    if topology.devices > (count := torch.cuda.device_count()):
        raise UsageError(f"topology {topology}: {topology.devices} devices > {count} on this machine")


def device_of(first: torch.device, index: int) -> str:
    """The device of a rank: CUDA's number `index` of its machine, or the CPU."""
    return f"cuda:{index}" if first.type == "cuda" else "cpu"


@dataclass(frozen=True)
class _Listener:
    """What ranks say, into the recording and the loading progress. offsets_ns: of other machines' clocks."""

    wiring: Wiring
    offsets_ns: Mapping[str, int] = field(default_factory=dict)

    def heard(self, name: str, message: Spans | Loading) -> None:
        if isinstance(message, Spans):
            self.wiring.recorder.absorb(message.batch, self.offsets_ns.get(name, 0))
        else:
            self.wiring.progress(f"{name}: {message.part}", message.seconds, message.fraction)


def _join(plan: Assignment, device: torch.device, team: Team, wiring: Wiring, own: _Own) -> Pipeline:
    from wanrt.pipeline.devices import set_threads

    def check() -> None:
        # first: when a rank dies, torchrun ends the others by a signal, which is not the cause
        team.check()
        outer.check()

    set_threads(device, plan.topology.devices)
    outer, wiring = wiring, replace(wiring, check=check)
    lanes = _lanes(plan, device)
    # On a device of its own stage 0 loads beside the mesh, which must not wait for it. On the mesh's first device it
    # loads while the other processes may still be importing: its own work is the same whenever it is done.
    early = None if plan.topology.pp1 else _load_stage0(plan, device, wiring, lanes)
    groups = _meet(plan, device, team, wiring)
    models, codec = early or _load_stage0(plan, device, wiring, lanes)
    with answering(team, "warm-up broke off"):
        # in every rank's order, the mesh first: capturing graphs is a joint effort
        local = part = None
        own.parts.extend(groups.shared)
        if groups.mesh is not None:
            own.parts.append(local := _mesh_part(plan, groups, device, wiring, lanes))
        if groups.vae is not None:
            own.parts.append(part := _vae_part(plan, groups, models.vae, device, wiring, lanes))
        with timed(wiring.progress, "other ranks"):
            team.wait_ready(wiring.check)
    if part is not None:
        codec = TeamCodec(team, part, _names(plan, lambda rank: rank.vae is not None))
    handle = RankedMesh(
        team,
        _link(plan, device, groups),
        local,
        _names(plan, lambda rank: rank.mesh is not None),
        launch_on_submit=device.type == "cuda",
        parts=own.parts,
        cleanup=own.cleanup,
    )
    return join_stage0(plan.job, models, handle, device, wiring, plan.tuning, lanes, codec)


def _load_stage0(
    plan: Assignment, device: torch.device, wiring: Wiring, lanes: Lanes
) -> tuple[Stage0Models, Codec | None]:
    """Stage 0's models, and its VAE as this device alone runs it; None where the VAE is split."""
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import load_stage0

    precision = choose_precision(plan.job.precision, device)
    models = load_stage0(plan.job, plan.files, device, precision, wiring.loading)
    rehearse(plan.job, models, device, wiring, lanes)
    if plan.topology.vae > 1:
        return models, None
    return models, local_codec(plan.job, models.vae, device, wiring, plan.tuning, lanes)


def _meet(plan: Assignment, device: torch.device, team: Team, wiring: Wiring) -> Groups:
    """Waits for the processes, gives them their assignments, and joins the groups with them."""
    with timed(wiring.progress, "rank processes"):
        team.assign(wiring.check)
    with answering(team, "the ranks did not meet"), timed(wiring.progress, COMMUNICATOR):
        return _enter(plan, device)


def work(pipe: Connection, plan: Assignment) -> None:
    """The life of a rank besides stage 0: load, say so, serve."""
    from wanrt.pipeline.devices import set_threads, wait_passively

    wait_passively()
    import torch

    device = torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    log.info("%s, %d threads", device, set_threads(device, plan.topology.devices))

    def progress(part: str, seconds: float | None, fraction: float | None = None) -> None:
        pipe.send(Loading(part, seconds, fraction))

    with timed(progress, COMMUNICATOR):
        groups = _enter(plan, device)
    recorder = make_recorder(plan.job, device, plan.started_ns, plan.name)
    lanes = _lanes(plan, device)
    roles = _take_roles(plan, groups, device, Wiring(recorder, progress=progress), lanes)
    pipe.send(Ready())
    try:
        with lanes.main():
            serve(roles, _link(plan, device, groups), pipe, recorder)
    finally:
        for part in (*groups.shared, *roles.parts):
            part.close()


def follow_runs(pipe: Connection, plan: Assignment) -> None:
    """One run of a rank that torchrun started; what it took is given back, for there may be another."""
    import gc

    from wanrt.pipeline.build import find_files

    try:
        # its own: another node may keep its weights elsewhere
        work(pipe, replace(plan, files=find_files(plan.job)))
    finally:
        leave_group()
    gc.collect()
    if plan.device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Groups:
    """The process groups this rank is in. down: stage 0 and the mesh, where there are others; None: not in it.

    mesh_peers, vae_peers: the memory that the mesh's ranks share, and the VAE's, if they can.
    """

    mesh: ProcessGroup | None
    vae: ProcessGroup | None
    down: ProcessGroup | None
    mesh_peers: Peers | None
    vae_peers: Peers | None

    @property
    def shared(self) -> tuple[Peers, ...]:
        """To be closed before all else: what others wait for in vain must run to its end first."""
        return tuple(peers for peers in (self.mesh_peers, self.vae_peers) if peers is not None)


def _enter(plan: Assignment, device: torch.device) -> Groups:
    """Joins the world and this rank's groups. Every rank makes the same calls."""
    from wanrt.parallel.peers import open_peers

    ranks = plan.topology.ranks()
    join_group(
        plan.backend, plan.store, plan.rank, len(ranks), plan.watchdog_s, device, loopback=plan.one_machine
    )
    mesh = _group(plan, [rank.rank for rank in ranks if rank.mesh is not None])
    linked = [rank.rank for rank in ranks if rank.stage0 or rank.mesh is not None]
    vae = down = None
    if plan.topology.vae > 1:
        vae = _group(plan, [rank.rank for rank in ranks if rank.vae is not None])
        down = _group(plan, linked)
    # kernels that store on other ranks look like kernels without a result to the compiler
    against = "the compiler would drop what stores elsewhere" if plan.tuning.compile else None
    # in the same order everywhere: opening is a joint call of those that share
    mesh_peers = None if mesh is None else open_peers(mesh, device, against)
    vae_peers = None if vae is None else open_peers(vae, device)  # the VAE is never compiled
    groups = Groups(mesh, vae, down, mesh_peers, vae_peers)
    if plan.rank in linked:
        _link(plan, device, groups).rehearse()
    return groups


def _group(plan: Assignment, members: list[int]) -> ProcessGroup | None:
    import torch.distributed as dist

    group = dist.new_group(members)
    return group if plan.rank in members else None


def _names(plan: Assignment, role: Callable[[Rank], bool]) -> frozenset[str]:
    """Names of the ranks besides stage 0 that have a role."""
    return frozenset(rank.name for rank in plan.topology.ranks() if role(rank) and not rank.stage0)


def _lanes(plan: Assignment, device: torch.device) -> Lanes:
    """One lane where mesh and split VAE meet on a device: each has a process group of its own."""
    pp1 = plan.topology.pp1
    return lanes_for(device, apart=pp1 or plan.topology.vae == 1, early=pp1)


def _take_roles(
    plan: Assignment, groups: Groups, device: torch.device, wiring: Wiring, lanes: Lanes
) -> Roles:
    """Loads what this rank takes part in, in the order of `_join`."""
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import load_streaming_vae

    mesh = None if groups.mesh is None else _mesh_part(plan, groups, device, wiring, lanes)
    part = None
    if groups.vae is not None:
        precision = choose_precision(plan.job.precision, device)
        vae = load_streaming_vae(plan.job, plan.files, device, precision, wiring.loading)
        part = _vae_part(plan, groups, vae, device, wiring, lanes)
    # the mesh's first rank sends latents up, if it is not stage 0 itself
    return Roles(mesh, part, answers=plan.topology.pp1 and plan.rank == plan.topology.stage0_devices)


def _mesh_part(plan: Assignment, groups: Groups, device: torch.device, wiring: Wiring, lanes: Lanes) -> Mesh:
    from wanrt.parallel.plan import ShardPlan
    from wanrt.parallel.topology import MeshKind
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import Shard, load_transformer

    assert groups.mesh is not None
    job, shards, peers = plan.job, ShardPlan.of(plan.topology), groups.mesh_peers
    precision = choose_precision(job.precision, device)
    with lanes.main():
        transformer = load_transformer(
            job, plan.files, device, precision, wiring.loading, Shard(shards, groups.mesh, peers)
        )
        heads = shards.local_heads(job.preset.transformer.num_heads)
        # under Ulysses the others store this rank's keys and values
        empty = peers.empty if peers is not None and shards.kind is MeshKind.ULYSSES else None
        return make_mesh(job, transformer, device, wiring, plan.tuning, CacheShare(heads, empty))


def _vae_part(
    plan: Assignment,
    groups: Groups,
    vae: StreamingVae,
    device: torch.device,
    wiring: Wiring,
    lanes: Lanes,
) -> VaePart:
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import split_vae

    assert groups.vae is not None
    job, precision = plan.job, choose_precision(plan.job.precision, device)
    with lanes.main():
        # not `loading`: as for the transformer's graphs, nothing may raise between capture and who closes it
        band = split_vae(
            vae, job, precision, groups.vae, groups.vae_peers,
            graphs=plan.tuning.graphs, progress=wiring.progress,
        )  # fmt: skip
    b, c, _, h, w = mesh_settings(job).shape
    return VaePart(band, groups.vae, (b, c, 1, h, w), device, lanes)


def _link(plan: Assignment, device: torch.device, groups: Groups) -> Link:
    return Link(device, mesh_settings(plan.job).shape, plan.topology.stage0_devices, groups.down)
