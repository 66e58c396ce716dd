"""Which topology `auto` is, and why; and whether one fits the machine's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wanrt.errors import UsageError
from wanrt.parallel.hardware import Device, Link, akin, known, predict, rescale
from wanrt.parallel.topology import MeshKind, Topology, check, why_not
from wanrt.parallel.workload import GIB, Workload, memory
from wanrt.telemetry.simulator import Prediction, StageCosts, simulate

MEMORY_MARGIN = 0.95  # of a device's memory; the estimate leaves out what other processes hold


@dataclass(frozen=True)
class Machine:
    """What there is: equal devices, their memory in bytes (None: unknown, nothing is refused for it), their link."""

    devices: int
    name: str = "CPU"
    memory: int | None = None
    link: Link = Link.NVLINK

    @property
    def figures(self) -> Device | None:
        """Measured figures of this kind of device, or None."""
        return known(self.name)

    @property
    def proportions(self) -> Device | None:
        """Figures whose proportions hold for this kind of device, for carrying a measured run over; or None."""
        return akin(self.name)


@dataclass(frozen=True)
class Choice:
    """A topology and the reason for it, in a sentence."""

    topology: Topology
    reason: str


def costs(
    work: Workload, topology: Topology, machine: Machine, measured: StageCosts | None = None
) -> StageCosts | None:
    """Stage costs on this machine: from figures of its devices, scaled to a measured run on one; else None.

    measured: of a run on one device of this machine. Without figures it holds for `single` only.
    """
    if measured is None:
        figures = machine.figures
        return None if figures is None else predict(work, topology, figures, machine.link)
    if topology == Topology():
        return measured
    figures = machine.proportions
    if figures is not None:
        return rescale(measured, work, topology, figures, machine.link)
    return None


def forecast(
    work: Workload, topology: Topology, machine: Machine, policy: str, measured: StageCosts | None = None
) -> Prediction | None:
    """Period and frame rate, or None where no figures are known."""
    found = costs(work, topology, machine, measured)
    return None if found is None else simulate(found, policy, pp1=topology.pp1, window=work.window)


def resolve(
    text: str,
    work: Workload,
    machine: Machine,
    policy: str,
    measured: StageCosts | None = None,
    *,
    world: int | None = None,
) -> Choice:
    """The topology that `text` names, or the one that `auto` stands for. world: see `check_world`.

    Raises `UsageError` with the failed equation, the devices that lack, or the memory that does not fit, and what
    would.
    """
    if text == "auto":
        return automatic(work, machine, policy, measured, world)
    topology = Topology.parse(text)
    check_world(topology, work, world)
    check(topology, work.shape, machine.devices)
    check_memory(topology, work, machine)
    return Choice(topology, "as asked for")


def check_world(topology: Topology, work: Workload, world: int | None) -> None:
    """Refuse a topology that does not use exactly the ranks that torchrun started; None: nobody did.

    Raises `UsageError` with the equation and topologies of that many devices.
    """
    if world is None or topology.devices == world:
        return
    fitting = [str(t) for t in candidates(work, Machine(world)) if t.devices == world]
    advice = f", or take {' or '.join(fitting[:3])}" if fitting else ""
    raise UsageError(
        f"topology {topology}: {topology.equation}, but WORLD_SIZE = {world}; "
        f"start {topology.devices}{advice}"
    )


def check_memory(topology: Topology, work: Workload, machine: Machine) -> None:
    """Refuse what will not fit, before anything loads. Raises `UsageError`."""
    short = _shortage(topology, work, machine)
    if short is None:
        return
    rank, need = short
    options = [str(t) for t in candidates(work, machine) if _shortage(t, work, machine) is None]
    advice = (
        f"fits: {', '.join(options[:3])}" if options else "take a smaller --size or a device with more memory"
    )
    assert machine.memory is not None
    raise UsageError(
        f"topology {topology}: rank {rank} needs about {need / GIB:.1f} GiB, "
        f"its device has {machine.memory / GIB:.1f} GiB; {advice}"
    )


def _shortage(topology: Topology, work: Workload, machine: Machine) -> tuple[int, int] | None:
    """The first rank whose device is too small, and what it needs."""
    if machine.memory is None:
        return None
    needs = [part.total for part in memory(work, topology)]
    return next(((i, need) for i, need in enumerate(needs) if need > MEMORY_MARGIN * machine.memory), None)


def candidates(work: Workload, machine: Machine) -> list[Topology]:
    """What `auto` picks from: every valid split of up to all devices, those with the VAE on one device first."""
    meshes = [Topology()] + [
        Topology(kind, mesh, pp1)
        for pp1 in (False, True)
        for kind in (MeshKind.ULYSSES, MeshKind.TP)
        for mesh in range(1 if pp1 else 2, machine.devices + 1)
    ]
    every = meshes + [
        replace(mesh, vae=parts) for mesh in meshes for parts in _vae_parts(mesh, work, machine)
    ]
    return [t for t in every if why_not(t, work.shape, machine.devices) is None]


def _vae_parts(mesh: Topology, work: Workload, machine: Machine) -> range:
    """On how many devices the VAE may be split: those beside the mesh, or under no PP1 the mesh's own."""
    if not work.vae_splits:
        return range(0)
    return range(2, (machine.devices - mesh.mesh if mesh.pp1 else mesh.mesh) + 1)


def automatic(
    work: Workload,
    machine: Machine,
    policy: str,
    measured: StageCosts | None = None,
    world: int | None = None,
) -> Choice:
    """The fastest candidate that fits by prediction; where nothing is known of the devices, a rule.

    The rule: Ulysses, which is ahead of tensor parallelism on every link measured, on as many devices as divide;
    stage 0 apart (PP1) from three devices on, where one more rank would gain the mesh less; the VAE on one device.
    world: only topologies of so many devices. Raises `UsageError` when none fits.
    """
    every = [t for t in candidates(work, machine) if world in (None, t.devices)]
    if not every:
        raise UsageError(f"topology auto: none of {world} devices divides this model; start fewer ranks")
    fitting = [t for t in every if _shortage(t, work, machine) is None]
    if not fitting:
        check_memory(every[0], work, machine)
    if len(fitting) == 1:
        return Choice(fitting[0], "the only one that divides, fits and has its devices")
    found = {t: forecast(work, t, machine, policy, measured) for t in fitting}
    known = {t: p for t, p in found.items() if p is not None}
    if len(known) < 2:
        return _by_rule(fitting)
    ranked = sorted(known, key=lambda t: (-known[t].fps, t.devices, t.vae))
    best, second = ranked[:2]
    reason = f"fastest by prediction: {known[best].fps:.1f} fps, then {second} with {known[second].fps:.1f}"
    return Choice(best, reason + _split_gain(best, known))


def _split_gain(best: Topology, known: Mapping[Topology, Prediction]) -> str:
    """What splitting the VAE does to the same mesh, in words; nothing where it is whole."""
    whole = known.get(replace(best, vae=1))
    if best.vae == 1 or whole is None:
        return ""
    split = known[best]
    return (
        f"; the VAE split in {best.vae} shortens the period of this mesh from {whole.period:.0f} to "
        f"{split.period:.0f} ms, its wait for the anchor from {whole.bubble:.0f} to {split.bubble:.0f}"
    )


def _by_rule(fitting: list[Topology]) -> Choice:
    def order(topology: Topology) -> tuple[bool, bool, bool, bool, int]:
        usual = not topology.pp1 or topology.devices >= 3
        apart = topology.pp1 and topology.devices >= 3
        return (usual, topology.vae == 1, topology.kind is MeshKind.ULYSSES, apart, topology.mesh)

    best = max(fitting, key=order)
    return Choice(best, "no figures for these devices: Ulysses first, stage 0 apart from three devices on")
