"""`wanrt probe-compile` as functions: measure a transformer eager and compiled, say what compiling does to it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wanrt import __version__
from wanrt.probes.compile_graphs import Event, Tracing, follow, trace_passes
from wanrt.probes.compile_kernels import FUSIBLE
from wanrt.probes.compile_profile import PassTime, measure_pass
from wanrt.probes.compile_subject import CompileSubject, Variant
from wanrt.probes.compile_traffic import Traffic, TrafficTrace, trace_pass
from wanrt.probes.vae_cost import Roofline, measure_roofline
from wanrt.probes.vae_partial import Verdict
from wanrt.telemetry.export import machine

ROUNDS = {"cuda": 8, "cpu": 5}
WARM_UP = 2
GRAPHS, STAYS, GAIN, REST = (
    "Does it trace whole?",
    "Does it stay compiled?",
    "What does compiling gain?",
    "What could fusion still remove?",
)


@dataclass(frozen=True)
class VariantTime:
    """The passes of a steady chunk as one variant runs them."""

    variant: Variant
    passes: tuple[PassTime, ...]

    def chunk_ms(self, steps: int) -> float:
        """A chunk: the denoising step `steps` times, the other pass once."""
        return sum(p.wall_ms * (steps if p.name == "denoise" else 1) for p in self.passes)


@dataclass(frozen=True)
class CompileReport:
    """Everything that was measured."""

    version: str
    device: str
    machine: dict[str, object]
    settings: dict[str, Any]
    ceilings: Roofline
    tracing: tuple[Tracing, ...]
    events: tuple[Event, ...]
    traffic: dict[str, dict[str, Traffic]]  # path -> pass -> bytes of its eager operators
    runs: tuple[VariantTime, ...]

    def run(self, path: str, compiled: bool) -> VariantTime | None:
        """One variant, if it exists here."""
        return next((r for r in self.runs if r.variant == Variant(path, compiled)), None)

    def floor_ms(self, name: str) -> float:
        """What the bytes that must move between products take at the measured copy bandwidth."""
        return self.traffic["plain"][name].needed / self.ceilings.gigabytes / 1e6

    def removable_ms(self, p: PassTime) -> float:
        """Elementwise and copy time above that floor."""
        return max(0.0, fusible_ms(p) - self.floor_ms(p.name))

    def removable(self, run: VariantTime) -> float:
        """Share of a chunk's time."""
        steps = self.settings["steps"]
        removable = sum(self.removable_ms(p) * (steps if p.name == "denoise" else 1) for p in run.passes)
        return removable / run.chunk_ms(steps)

    def traffic_document(self) -> dict[str, Any]:
        """Bytes and floors by path and pass."""
        return {
            path: {name: {**asdict(t), "floor_ms": self.floor_ms(name)} for name, t in passes.items()}
            for path, passes in self.traffic.items()
        }

    def verdicts(self) -> Iterator[tuple[str, Verdict | None, str]]:
        """Question, verdict, answer."""
        yield GRAPHS, *_traces_whole(self.tracing)
        yield STAYS, *_stays(self.events)
        yield GAIN, None, "; ".join(_gains(self))
        yield REST, None, "; ".join(_rests(self))


def fusible_ms(p: PassTime) -> float:
    """Time in kernels that a compiler can fuse: elementwise, reductions, norms, copies."""
    return sum(p.classes[work].ms for work in FUSIBLE if work in p.classes)


def _traces_whole(tracing: tuple[Tracing, ...]) -> tuple[Verdict, str]:
    broken = [t for t in tracing if t.breaks]
    if not broken:
        return Verdict.YES, f"one graph a pass, no breaks: {', '.join(t.name for t in tracing)}"
    first = broken[0].breaks[0]
    total = sum(len(t.breaks) for t in broken)
    return Verdict.NO, f"{total} graph breaks, the first at {first.file}:{first.line}: {first.reason}"


def _stays(events: tuple[Event, ...]) -> tuple[Verdict, str]:
    guilty = [event for event in events if event.live and event.compiled]
    due = sum(len(event.compiled) for event in events if not event.live)
    live = sum(event.live for event in events)
    if not guilty:
        return Verdict.YES, f"{due} graphs while the stream fills, none in {live} live changes after that"
    first = guilty[0]
    return Verdict.NO, f"{first.name} compiles {len(first.compiled)} graphs anew: {first.compiled[0].guard}"


def _gains(report: CompileReport) -> Iterator[str]:
    steps = report.settings["steps"]
    for path in report.traffic:
        eager, compiled = report.run(path, False), report.run(path, True)
        if eager is not None and compiled is not None:
            before, after = eager.chunk_ms(steps), compiled.chunk_ms(steps)
            yield f"{path}: {before:.1f} to {after:.1f} ms a chunk, {100 * (before / after - 1):+.1f} % speed"
    plain, own = report.run("plain", True), report.run("own", False)
    if plain is not None and own is not None:
        ratio = plain.chunk_ms(steps) / own.chunk_ms(steps)
        yield f"own kernels uncompiled against plain compiled: {100 * (ratio - 1):+.1f} % speed"


def _rests(report: CompileReport) -> Iterator[str]:
    for run in report.runs:
        yield f"{run.variant.name} {report.removable(run):.1%}".replace("%", " %")


def probe(subject: CompileSubject, progress: Callable[[str], None] = lambda _what: None) -> CompileReport:
    """Measure everything once; `progress` is told before each part.

    Raises `RunError` when the compiler cannot work on this machine.
    """
    device, dtype = subject.device, subject.model.dtype
    progress("device ceilings")
    ceilings = measure_roofline(device, dtype)
    tracing = trace_passes(subject, lambda name: progress(f"graph breaks: {name}"))
    traffic = {}
    for path in dict.fromkeys(v.path for v in subject.variants()):
        progress(f"bytes between products: {path}")
        traffic[path] = _traffic(subject, path)
    runs = tuple(_measure(subject, variant, progress) for variant in subject.variants())
    events = follow(subject, lambda name: progress(f"recompilations: {name}"))
    progress("device ceilings again")
    return CompileReport(
        version=__version__,
        device=device_name(device),
        machine=machine(),
        settings=settings(subject),
        ceilings=ceilings.best(measure_roofline(device, dtype)),
        tracing=tracing,
        events=events,
        traffic=traffic,
        runs=runs,
    )


def settings(subject: CompileSubject) -> dict[str, Any]:
    """What was run, as plain data."""
    return {
        "preset": subject.preset.name,
        "size": list(subject.size),
        "layers": subject.model.config.num_layers,
        "layers_of": subject.preset.transformer.num_layers,
        "steps": subject.steps,
        "window": subject.cache.capacity,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "backend": subject.backend,
        "threads": torch.get_num_threads(),
        "paths": subject.model.paths(),
    }


def device_name(device: torch.device) -> str:
    """As its driver calls it; a CPU by its architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _traffic(subject: CompileSubject, path: str) -> dict[str, Traffic]:
    found = {}
    for name, plan in subject.plans().items():
        trace = TrafficTrace()
        with subject.arranged(Variant(path, False)):
            if path == "own":
                subject.model.elementwise = trace.elementwise(subject.model.elementwise)
            found[name] = trace_pass(subject.runner(plan), trace)
    return found


def _measure(subject: CompileSubject, variant: Variant, progress: Callable[[str], None]) -> VariantTime:
    passes = []
    with subject.arranged(variant), torch.inference_mode():
        for name, plan in subject.plans().items():
            run = subject.runner(plan)
            progress(f"{variant.name}: {name}, {'compiling' if variant.compiled else 'first run'}")
            for _ in range(WARM_UP):
                run()
            progress(f"{variant.name}: {name}, timing")
            rounds = ROUNDS[subject.device.type]
            passes.append(measure_pass(name, run, subject.device, rounds=rounds))
    return VariantTime(variant, tuple(passes))
