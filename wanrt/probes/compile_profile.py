"""The time of one pass: by the clock, and by class of work from torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from wanrt.probes.compile_kernels import Work, cpu_work, gpu_work
from wanrt.probes.vae_partial import synchronise

SYNCS = (
    "Context Sync",
    "Event Sync",
    "Stream Sync",
    "Stream Wait Event",
)  # waits that CUPTI lists among kernels
PROFILED = {
    "cuda": 2,
    "cpu": 5,
}  # rounds; on CUDA each starts and stops CUPTI, and a kernel's time varies little
TOP_KERNELS = 24  # in the JSON; the rest is in the sums


@dataclass(frozen=True)
class Share:
    """Kernels (on a CPU: operators) of one class in one pass."""

    count: int
    ms: float


@dataclass(frozen=True)
class Kernel:
    """One kernel by its name, summed over a pass."""

    name: str
    work: Work
    count: int
    ms: float


@dataclass(frozen=True)
class PassTime:
    """One pass of one variant.

    Attributes:
        wall_ms: by the clock, passes queued back to back, without the profiler.
        host_ms: until the host has queued it (CUDA; on a CPU None: host and device are one).
        classes: time in kernels by class.
        kernels: the longest.
    """

    name: str
    wall_ms: float
    host_ms: float | None
    classes: dict[Work, Share]
    kernels: tuple[Kernel, ...]

    @property
    def busy_ms(self) -> float:
        """Time in kernels of every class."""
        return sum(share.ms for share in self.classes.values())

    @property
    def gap_ms(self) -> float:
        """Time in which no kernel runs: launches, Python, dispatch. Slightly negative when the profiler's kernels ran
        slower than the clock's, or side by side.
        """
        return self.wall_ms - self.busy_ms


def measure_pass(name: str, run: Callable[[], Any], device: torch.device, *, rounds: int) -> PassTime:
    """Time `run` by the clock and, in the first `PROFILED` rounds, by the profiler, in turns; of each the best round,
    since a busy machine is only ever slower. `run` is warm already: compiled, its libraries' kernels chosen.
    """
    together = 4 if device.type == "cuda" else 1
    walls, hosts, profiles = [], [], []
    for index in range(rounds):
        wall, host = _clock(run, device, together)
        walls.append(wall)
        hosts.append(host)
        if index < PROFILED[device.type]:
            profiles.append(_profiled(run, device))
    kernels = min(profiles, key=lambda found: sum(kernel.ms for kernel in found))
    host_ms = min(hosts) if device.type == "cuda" else None
    return PassTime(name, min(walls), host_ms, by_class(kernels), kernels[:TOP_KERNELS])


def by_class(kernels: Iterable[Kernel]) -> dict[Work, Share]:
    """Sums per class, in the order of `Work`; classes without kernels are left out."""
    found = tuple(kernels)
    sums = {work: [k for k in found if k.work is work] for work in Work}
    return {w: Share(sum(k.count for k in ks), sum(k.ms for k in ks)) for w, ks in sums.items() if ks}


def _clock(run: Callable[[], Any], device: torch.device, together: int) -> tuple[float, float]:
    """Milliseconds a run takes, and until the host has queued it."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(together):
        run()
    queued = time.perf_counter()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3 / together, (queued - start) * 1e3 / together


def _profiled(run: Callable[[], Any], device: torch.device) -> tuple[Kernel, ...]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    synchronise(device)
    # acc_events: keep the one cycle's events; without it, torch warns that it drops those of earlier ones
    with profile(activities=activities, acc_events=True) as profiler:
        run()
        synchronise(device)
    return (gpu_kernels if on_gpu else cpu_kernels)(profiler.events() or ())


def gpu_kernels(events: Iterable[FunctionEvent]) -> tuple[Kernel, ...]:
    """What ran on the GPU, longest first; spans that only annotate its timeline, and waits, are not kernels."""
    times: dict[str, list[float]] = {}
    for event in events:
        ran = event.device_type == torch.autograd.DeviceType.CUDA and event.name not in SYNCS
        if ran and not event.is_user_annotation:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return _sorted(Kernel(n, gpu_work(n), len(t), sum(t) / 1e3) for n, t in times.items())


def cpu_kernels(events: Iterable[FunctionEvent]) -> tuple[Kernel, ...]:
    """Operators by the time in themselves, longest first; the host's bookkeeping is left out."""
    times: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU and cpu_work(event.name) is not None:
            times.setdefault(event.name, []).append(event.self_cpu_time_total)
    return _sorted(Kernel(n, cpu_work(n) or Work.OTHER, len(t), sum(t) / 1e3) for n, t in times.items())


def _sorted(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    return tuple(sorted(kernels, key=lambda kernel: -kernel.ms))
