"""What `wanrt bench --vae` measured, as a table and as JSON; `wanrt.probes.vae_race` says what the columns are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from wanrt.pipeline.bench_report import Timing, Unmeasured

PACKAGES = ("torch", "triton", "diffusers", "fastvae")
OURS = "wanrt"


@dataclass(frozen=True)
class RaceRun:
    """One implementation at one size. Times are of one call; `peak_mib` is what the device's allocator held."""

    size: str
    implementation: str
    dtype: str
    calls: Mapping[str, Timing]
    build_s: float
    warm_up_s: float
    state_mib: float | None
    peak_mib: float | None  # at most, whole clips left out; None on a CPU
    clip_peak_mib: float | None  # with them
    error_against_diffusers: float | None  # None without diffusers

    def ratios(self, ours: RaceRun | None) -> dict[str, float]:
        """Median over wanrt's, call by call, where both were measured."""
        known = {} if ours is None else ours.calls
        return {name: t.p50_ms / known[name].p50_ms for name, t in self.calls.items() if name in known}


@dataclass(frozen=True)
class Race:
    """All runs so far, in order, and what they were made with."""

    settings: Mapping[str, object]
    runs: tuple[RaceRun | Unmeasured, ...] = ()

    def ours(self, size: str) -> RaceRun | None:
        """wanrt's own run of a size."""
        found = (
            r for r in self.runs if isinstance(r, RaceRun) and (r.size, r.implementation) == (size, OURS)
        )
        return next(found, None)

    def document(self) -> dict[str, object]:
        """As JSON: settings, runs with their ratios, versions, the machine."""
        import torch

        from wanrt.telemetry.export import installed_version, machine

        versions = {name: installed_version(name) for name in PACKAGES}
        return {
            "schema": 1,
            "settings": dict(self.settings),
            "runs": [self._run(run) for run in self.runs],
            "versions": {**versions, "cudnn": torch.backends.cudnn.version()},
            "machine": machine(),
        }

    def _run(self, run: RaceRun | Unmeasured) -> dict[str, object]:
        if isinstance(run, Unmeasured):
            return run.document()
        return {**asdict(run), "ratios": run.ratios(self.ours(run.size))}

    def table(self) -> str:
        """A line for each implementation and call; what it took to get there; what was not measured."""
        from wanrt.probes.vae_entrants import CALLS

        rows: list[tuple[str, ...]] = [("implementation", "call", "size", "ms", "p95", f"x {OURS}")]
        measured = [run for run in self.runs if isinstance(run, RaceRun)]
        for run in measured:
            ratios = run.ratios(self.ours(run.size))
            rows += [
                (
                    run.implementation,
                    CALLS[name],
                    run.size,
                    f"{t.p50_ms:.2f}",
                    f"{t.p95_ms:.2f}",
                    f"{ratios[name]:.2f}",
                )
                for name, t in run.calls.items()
            ]
        left = [f"not measured: {run.name}: {run.reason}" for run in self.runs if isinstance(run, Unmeasured)]
        about = f"medians, ms; a whole clip is {self.settings['clip_latents']} latents; random weights"
        return "\n".join([*_aligned(rows), *(_about(run) for run in measured), *left, about])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _about(run: RaceRun) -> str:
    parts = [f"built in {run.build_s:.1f} s, warm after {run.warm_up_s:.1f} s more"]
    if run.state_mib is not None:
        parts.append(f"decoder state {run.state_mib:.1f} MiB")
    if run.peak_mib is not None:
        parts.append(f"peak {run.peak_mib:.0f} MiB")
    if run.clip_peak_mib is not None:
        parts.append(f"with a whole clip {run.clip_peak_mib:.0f} MiB")
    if run.error_against_diffusers is not None:
        parts.append(f"error {run.error_against_diffusers:.1e}")
    return f"{run.implementation} {run.size}, {run.dtype}: {', '.join(parts)}"
