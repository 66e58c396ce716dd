"""`wanrt plan`: a job on a machine, before anything loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.parallel.choose import Choice, Machine, candidates, forecast, resolve
from wanrt.parallel.hardware import DEVICES, Link
from wanrt.parallel.topology import Topology
from wanrt.parallel.workload import GIB, MIB, DeviceMemory, Traffic, Workload, memory, traffic
from wanrt.telemetry.simulator import POLICIES, Prediction, StageCosts

if TYPE_CHECKING:
    from wanrt.script import RenderJob

COLUMNS = ("weights", "cache", "vae", "text", "work", "total")


@dataclass(frozen=True)
class Plan:
    """Everything that `wanrt plan` says. `policies` and `others`: predicted fps by policy, and by topology."""

    title: str
    machine: Machine
    choice: Choice
    memory: tuple[DeviceMemory, ...]
    traffic: Traffic
    prediction: Prediction | None
    basis: str
    policies: Mapping[str, float]
    others: Mapping[str, float]


def make_plan(job: RenderJob, machine: Machine, measured: StageCosts | None = None) -> Plan:
    """Plan `job` on `machine`. Raises `UsageError` for what the machine or the model cannot do."""
    work = Workload.of(job)
    choice = resolve(job.topology, work, machine, job.anchor, measured)
    topology = choice.topology
    others = [t for t in candidates(work, machine) if t != topology]

    def rate(policy: str, other: Topology = topology) -> float | None:
        found = forecast(work, other, machine, policy, measured)
        return None if found is None else found.fps

    return Plan(
        title=f"{job.preset.name}  {job.width}x{job.height}  window {job.window}  {work.steps} steps  {job.anchor}",
        machine=machine,
        choice=choice,
        memory=tuple(memory(work, topology)),
        traffic=traffic(work, topology, shared=machine.link is Link.NVLINK),
        prediction=forecast(work, topology, machine, job.anchor, measured),
        basis=_basis(machine, measured),
        policies=_known({policy: rate(policy) for policy in POLICIES} if work.recompute else {}),
        others=_known({str(other): rate(job.anchor, other) for other in others}),
    )


def _known(rates: Mapping[str, float | None]) -> dict[str, float]:
    return {name: fps for name, fps in rates.items() if fps is not None}


def _basis(machine: Machine, measured: StageCosts | None) -> str:
    figures = machine.figures
    link = "" if machine.devices == 1 else f", link {machine.link}"
    if measured is not None:
        carried = machine.proportions
        return "the measured run" + (
            f", carried over with figures of {carried.name}{link}" if carried else ""
        )
    if figures is None:
        names = ", ".join(device.name for device in DEVICES)
        return f"none for {machine.name} ({names} known); measure with `wanrt bench --json FILE`, give --costs FILE"
    return f"figures of {figures.name}{link}"


def read_costs(path: str | Path) -> StageCosts:
    """Stage costs from a file of `wanrt bench --json` (its first run) or `wanrt render --stats`.

    Raises `UsageError` for a file that is none, or one of a run on several devices.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        run = document["runs"][0] if "runs" in document else document
        topology = run["settings"]["topology"]
        if topology not in ("single", "auto"):
            raise UsageError(f"--costs {path}: a run with topology {topology}; expected single")
        if "costs" in run:
            return StageCosts(**run["costs"])
        on_gpu = bool(run["machine"]["devices"]) and run["settings"]["device"] != "cpu"
        return StageCosts.of_stats(run, beside=on_gpu)
    except OSError as error:
        raise UsageError(
            f"--costs {path}: {error.strerror}; expected a file of wanrt bench --json"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(
            f"--costs {path}: not a file of wanrt bench --json or render --stats with whole chunks ({error})"
        ) from error


def find_machine(devices: int | None, name: str | None, link: str | None, gib: float | None) -> Machine:
    """The machine asked about; what is not given is looked up on this one.

    Raises `UsageError` for an unknown link.
    """
    if link is not None and link not in tuple(Link):
        raise UsageError(f"--link {link}: expected {' or '.join(Link)}")
    chosen = Link.NVLINK if link is None else Link(link)
    given = None if gib is None else int(gib * GIB)
    if devices is not None and (name is not None or gib is not None):
        return Machine(devices, name or "unnamed device", given, chosen)
    found = _here()
    return Machine(
        devices=found.devices if devices is None else devices,
        name=found.name if name is None else name,
        memory=given if given is not None else found.memory if name is None else None,
        link=chosen if link is not None else found.link,
    )


def _here() -> Machine:
    """The CUDA devices of this machine; without any, one CPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        import psutil

        return Machine(1, "CPU", psutil.virtual_memory().total, Link.HOST)
    about = [torch.cuda.get_device_properties(i) for i in range(count)]
    peers = count == 1 or torch.cuda.can_device_access_peer(0, 1)
    smallest = min(device.total_memory for device in about)
    return Machine(count, about[0].name, smallest, Link.NVLINK if peers else Link.HOST)


def text(plan: Plan) -> str:
    """The plan as printed."""
    blocks = [_head(plan), _devices(plan), _moved(plan), _predicted(plan)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _head(plan: Plan) -> list[str]:
    machine = plan.machine
    size = f", {machine.memory / GIB:.0f} GiB each" if machine.memory else ""
    count = "1 device" if machine.devices == 1 else f"{machine.devices} devices"
    return [
        plan.title,
        f"machine    {count}: {machine.name}{size}",
        f"topology   {plan.choice.topology} ({plan.choice.reason})",
    ]


def _devices(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("rank", "role", *COLUMNS)]
    for rank, need in zip(plan.choice.topology.ranks(), plan.memory, strict=True):
        parts = [getattr(need, column) for column in COLUMNS]
        rows.append((str(rank.rank), rank.roles, *(f"{part / GIB:.1f}" if part else "-" for part in parts)))
    return [*_aligned(rows, left=2), "memory in GiB, estimated"]


def _moved(plan: Plan) -> list[str]:
    moved = plan.traffic
    parts = []
    if moved.mesh:
        parts.append(f"{moved.mesh / GIB:.2f} GiB sent by each mesh rank")
    if moved.stage0:
        parts.append(f"{moved.stage0 / MIB:.2f} MiB between stage 0 and mesh")
    if moved.vae:
        parts.append(
            f"{moved.vae / MIB:.1f} MiB sent by each VAE rank, {moved.pixels / MIB:.1f} MiB of pixels to stage 0"
        )
    return [f"moved      {', '.join(parts)}, a chunk"] if parts else []


def _predicted(plan: Plan) -> list[str]:
    p = plan.prediction
    if p is None:
        return [f"predicted  nothing; figures: {plan.basis}"]
    rows = [
        f"predicted  {p.period:.0f} ms a chunk, {p.fps:.1f} fps ({p.fps_without_vae:.1f} without VAE)",
        f"           mesh {p.mesh_share:.0%} busy, bubble {p.bubble:.0f} ms; stage 0 {p.stage0_share:.0%} busy",
        f"           bound by {p.bound}",
        f"figures    {plan.basis}",
    ]
    if plan.policies:
        rows.append("policies   " + _rates(plan.policies))
    if plan.others:
        best = dict(sorted(plan.others.items(), key=lambda item: -item[1])[:4])
        rows.append("others     " + _rates(best))
    return rows


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {fps:.1f}" for name, fps in rates.items())


def _aligned(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def as_json(plan: Plan) -> dict[str, object]:
    """The plan for `--json`: bytes, milliseconds, shares from 0 to 1."""
    topology = plan.choice.topology
    ranks = [
        {"rank": rank.rank, "name": rank.name, "roles": rank.roles, **asdict(need), "total": need.total}
        for rank, need in zip(topology.ranks(), plan.memory, strict=True)
    ]
    return {
        "job": plan.title,
        "machine": asdict(plan.machine),
        "topology": str(topology),
        "reason": plan.choice.reason,
        "ranks": ranks,
        "bytes_per_chunk": asdict(plan.traffic),
        "prediction": None if plan.prediction is None else asdict(plan.prediction),
        "figures": plan.basis,
        "fps_by_policy": dict(plan.policies),
        "fps_by_topology": dict(plan.others),
    }
