"""Which topology `auto` is, and why; and whether one fits the machine's memory."""

from __future__ import annotations

from dataclasses import dataclass

from wanrt.errors import UsageError
from wanrt.parallel.hardware import Device, Link, known, predict, rescale
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
    figures = machine.figures
    if measured is None:
        return None if figures is None else predict(work, topology, figures, machine.link)
    if figures is not None:
        return rescale(measured, work, topology, figures, machine.link)
    return measured if topology == Topology() else None


def forecast(
    work: Workload, topology: Topology, machine: Machine, policy: str, measured: StageCosts | None = None
) -> Prediction | None:
    """Period and frame rate, or None where no figures are known."""
    found = costs(work, topology, machine, measured)
    return None if found is None else simulate(found, policy, pp1=topology.pp1, window=work.window)


def resolve(
    text: str, work: Workload, machine: Machine, policy: str, measured: StageCosts | None = None
) -> Choice:
    """The topology that `text` names, or the one that `auto` stands for.

    Raises `UsageError` with the failed equation, the devices that lack, or the memory that does not fit, and what
    would.
    """
    if text == "auto":
        return automatic(work, machine, policy, measured)
    topology = Topology.parse(text)
    check(topology, work.shape, machine.devices)
    check_memory(topology, work, machine)
    return Choice(topology, "as asked for")


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
    """What `auto` picks from: every valid split of up to all devices; the VAE is only split when asked for."""
    every = [Topology()] + [
        Topology(kind, mesh, pp1)
        for pp1 in (False, True)
        for kind in (MeshKind.ULYSSES, MeshKind.TP)
        for mesh in range(1 if pp1 else 2, machine.devices + 1)
    ]
    return [t for t in every if why_not(t, work.shape, machine.devices) is None]


def automatic(work: Workload, machine: Machine, policy: str, measured: StageCosts | None = None) -> Choice:
    """The fastest candidate that fits by prediction; where nothing is known of the devices, a rule.

    The rule: Ulysses, which is ahead of tensor parallelism on every link measured, on as many devices as divide;
    stage 0 apart (PP1) from three devices on, where one more rank would gain the mesh less.
    """
    fitting = [t for t in candidates(work, machine) if _shortage(t, work, machine) is None]
    if not fitting:
        check_memory(Topology(), work, machine)
    if len(fitting) == 1:
        return Choice(fitting[0], "the only one that divides, fits and has its devices")
    found = {t: forecast(work, t, machine, policy, measured) for t in fitting}
    rates = {t: p.fps for t, p in found.items() if p is not None}
    if len(rates) < 2:
        return _by_rule(fitting)
    ranked = sorted(rates, key=lambda t: (-rates[t], t.devices))
    best, second = ranked[:2]
    return Choice(
        best, f"fastest by prediction: {rates[best]:.1f} fps, then {second} with {rates[second]:.1f}"
    )


def _by_rule(fitting: list[Topology]) -> Choice:
    def order(topology: Topology) -> tuple[bool, bool, int]:
        apart = topology.pp1 and topology.devices >= 3
        return (topology.kind is MeshKind.ULYSSES, apart, topology.mesh)

    best = max((t for t in fitting if not t.pp1 or t.devices >= 3), key=order)
    return Choice(best, "no figures for these devices: Ulysses first, stage 0 apart from three devices on")
