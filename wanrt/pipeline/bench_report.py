"""What `wanrt bench` measured: the report of one configuration, and the table of several.

Everything is read off the recording. Per chunk, medians over the measured chunks:

    period       from the start of a chunk's first pass to the start of the next one's
    mesh         time in the transformer's passes
    stage 0      time in the VAE and in the conversion to the encoder's format
    anchor path  what lies between two chunks' passes on the mesh: decode and encode of the anchor, and waiting

    fps          12 / period: what comes out;  fps without VAE: 12 / mesh, the mesh never waiting
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wanrt.errors import RunError
from wanrt.pipeline.matrix import NO_P2P
from wanrt.pipeline.run import settings
from wanrt.telemetry import Recorder, Span
from wanrt.telemetry.simulator import StageCosts

if TYPE_CHECKING:
    from wanrt.pipeline.build import Tuning
    from wanrt.script import RenderJob

CHUNK_FRAMES = 12
NOT_INCLUDED = ("text encoding", "video encoding", "loading and warm-up")
FIRST_HALF = 0.50
TAIL = 0.95


@dataclass(frozen=True)
class Timing:
    """One measure over the chunks, in milliseconds."""

    p50_ms: float
    p95_ms: float

    @classmethod
    def of(cls, values_ns: Iterable[float]) -> Timing:
        """Median and 95th percentile of nanoseconds."""
        from wanrt.telemetry.quantiles import quantile

        sample = list(values_ns)
        return cls(quantile(sample, FIRST_HALF) / 1e6, quantile(sample, TAIL) / 1e6)


@dataclass(frozen=True)
class BenchReport:
    """One measured configuration. See the module's head for the columns."""

    name: str
    settings: Mapping[str, object]
    warm_up_chunks: int
    chunks: int
    period: Timing
    mesh: Timing
    stage0: Timing
    anchor_path: Timing
    costs: StageCosts  # what `wanrt plan --costs` predicts other topologies from
    load_s: float
    warm_up_s: float
    memory_bytes: int | None  # most that the device's allocator held; None on a CPU
    startup: Mapping[str, float] = field(default_factory=dict)  # seconds by part; parts of ranks overlap
    prompt_tokens: int | None = (
        None  # of the prompt, on whose length the passes' time depends; None: not known
    )
    not_included: tuple[str, ...] = NOT_INCLUDED

    @property
    def fps(self) -> float:
        """Pixel frames per second, VAE included."""
        return CHUNK_FRAMES * 1e3 / self.period.p50_ms

    @property
    def fps_without_vae(self) -> float:
        """Pixel frames per second if the mesh never waited."""
        return CHUNK_FRAMES * 1e3 / self.mesh.p50_ms

    def document(self) -> dict[str, object]:
        """As JSON: the fields, the rates, the machine."""
        from wanrt.telemetry.export import machine

        rates = {"fps": self.fps, "fps_without_vae": self.fps_without_vae}
        return {"schema": 1, **asdict(self), **rates, "machine": machine()}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> BenchReport:
        """The report of a `document`."""
        timings = ("period", "mesh", "stage0", "anchor_path")
        # files of older versions have no startup and no prompt_tokens
        known: dict[str, Any] = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        known |= {name: Timing(**document[name]) for name in timings}
        return cls(**{**known, "costs": StageCosts(**document["costs"])})


@dataclass(frozen=True)
class Unmeasured:
    """A line of a matrix that could not be run, and why."""

    name: str
    reason: str

    def document(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


def report(
    job: RenderJob,
    spans: Mapping[int, list[Span]],
    warm_up: int,
    seconds: tuple[float, float],
    memory: int | None,
    tuning: Tuning,
    startup: Mapping[str, float] | None = None,
    prompt_tokens: int | None = None,
) -> BenchReport:
    """The measures of spans sorted by chunk. Raises `RunError` when a chunk was not recorded whole."""
    chunks = sorted(spans)
    ranks = sorted({s.rank for c in chunks for s in spans[c] if s.stage == "mesh"})
    # every rank of a mesh does the same at the same time: the first one speaks for all
    mesh = {c: [s for s in spans[c] if s.stage == "mesh" and s.rank == ranks[0]] for c in chunks if ranks}
    if not mesh or not all(mesh.values()):
        raise RunError("bench: the recording lacks passes of some chunks; this is a defect of wanrt")
    one_rank = {c: [*mesh[c], *(s for s in spans[c] if s.stage != "mesh")] for c in chunks}
    start = {c: min(s.start_ns for s in mesh[c]) for c in chunks}
    end = {c: max(s.end_ns for s in mesh[c]) for c in chunks}
    pairs = list(pairwise(chunks))
    return BenchReport(
        name=f"{job.topology} {job.anchor}",
        settings={**settings(job), "compile": tuning.compile, "graphs": tuning.graphs},
        warm_up_chunks=warm_up,
        chunks=len(chunks),
        period=Timing.of(start[b] - start[a] for a, b in pairs),
        mesh=Timing.of(sum(s.duration_ns for s in mesh[c]) for c in chunks),
        stage0=Timing.of(sum(s.duration_ns for s in spans[c] if s.stage == "stage0") for c in chunks),
        anchor_path=Timing.of(start[b] - end[a] for a, b in pairs),
        costs=StageCosts.of_chunks(
            one_rank, shared=not job.topology.startswith("pp1"), policy=job.anchor, window=job.window
        ),
        load_s=seconds[0],
        warm_up_s=seconds[1],
        memory_bytes=memory,
        startup=dict(startup or {}),
        prompt_tokens=prompt_tokens,
    )


def by_chunk(recorder: Recorder, chunks: range) -> dict[int, list[Span]]:
    """Outermost spans of these chunks."""
    found: dict[int, list[Span]] = {chunk: [] for chunk in chunks}
    for span in recorder.recent(float(10**6)):
        if span.chunk in found:
            found[span.chunk].append(span)
    return found


def table(reports: Iterable[BenchReport | Unmeasured]) -> str:
    """The scorecard's columns, one configuration a line, what could not be run, and what the times are of."""
    head = ("configuration", "period", "mesh", "stage 0", "anchor path", "fps", "fps without VAE")
    found = list(reports)
    rows = [head, *(_row(report) for report in found if isinstance(report, BenchReport))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    unmeasured = [f"not measured: {run.name}: {run.reason}" for run in found if isinstance(run, Unmeasured)]
    about = f"medians of steady chunks, ms{_prompts(found)}; not included: {', '.join(NOT_INCLUDED)}"
    return "\n".join([*lines, *_split_gains(found), *unmeasured, about])


def _prompts(found: Iterable[BenchReport | Unmeasured]) -> str:
    """How long the prompts were, where that is known."""
    lengths = {run.prompt_tokens for run in found if isinstance(run, BenchReport)} - {None}
    return f"; prompt of {' or '.join(map(str, sorted(filter(None, lengths))))} tokens" if lengths else ""


def _split_gains(found: Iterable[BenchReport | Unmeasured]) -> list[str]:
    """What splitting the VAE gained, wherever the same mesh was measured with and without."""
    same = ("anchor", "width", "height", "precision", "compile")
    runs = {
        (str(r.settings["topology"]), (NO_P2P in r.name, *(r.settings[key] for key in same))): r
        for r in found
        if isinstance(r, BenchReport)
    }
    lines = []
    for (topology, others), run in runs.items():
        whole = runs.get((topology.partition("+vae=")[0], others))
        if whole is None or whole is run:
            continue
        parts = [
            f"{name} {before:.2f} -> {after:.2f} ms ({before / after:.2f}x)"
            for name, before, after in (
                ("decode", whole.costs.decode, run.costs.decode),
                ("encode", whole.costs.encode, run.costs.encode),
            )
            if before and after
        ]
        lines.append(f"VAE split: {run.name}: {', '.join(parts)}")
    return lines


def _row(report: BenchReport) -> tuple[str, ...]:
    times = (report.period, report.mesh, report.stage0, report.anchor_path)
    rates = (report.fps, report.fps_without_vae)
    return (report.name, *(f"{t.p50_ms:.1f}" for t in times), *(f"{rate:.2f}" for rate in rates))
