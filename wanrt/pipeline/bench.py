"""`wanrt bench`: a pipeline without an encoder, warmed up, then measured in its steady state.

Everything is read off the recording. Per chunk, medians over the measured chunks:

    period       from the start of a chunk's first pass to the start of the next one's
    mesh         time in the transformer's passes
    stage 0      time in the VAE and in the conversion to the encoder's format
    anchor path  what lies between two chunks' passes on the mesh: decode and encode of the anchor, and waiting

    fps          12 / period: what comes out;  fps without VAE: 12 / mesh, the mesh never waiting
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import RunError, UsageError, WanrtError
from wanrt.output import PixelFormat, QueuedSink, Sink, VideoSpec
from wanrt.parallel.team import LIBRARY
from wanrt.pipeline.build import Tuning, Wiring, build_pipeline, find_files, make_recorder, settle_topology
from wanrt.pipeline.context import CHUNK_LATENTS, pixel_frames
from wanrt.pipeline.encoding import RecordedSink
from wanrt.pipeline.matrix import NO_P2P, Entry
from wanrt.pipeline.run import converter, one_line_errors, settings
from wanrt.pipeline.startup import Say, Startup, silent
from wanrt.telemetry import Recorder, Span
from wanrt.telemetry.simulator import StageCosts

if TYPE_CHECKING:
    import torch

    from wanrt.output.sink import Pixels
    from wanrt.parallel.crew import Crew
    from wanrt.parallel.reserve import Reserve
    from wanrt.pipeline.shelf import Shelf
    from wanrt.script import RenderJob

log = logging.getLogger("wanrt.pipeline")

WARM_UP_CHUNKS = 3  # shapes are static from the third chunk on with the usual window
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
        # files of older versions have no startup
        known: dict[str, Any] = {f.name: document[f.name] for f in fields(cls) if f.name in document}
        known |= {name: Timing(**document[name]) for name in timings}
        return cls(**{**known, "costs": StageCosts(**document["costs"])})


class DiscardingSink(Sink):
    """Takes frames in the encoder's format and drops them."""

    def __init__(self, spec: VideoSpec) -> None:
        self.spec, self.pixel_format = spec, PixelFormat.NV12

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        self.frames_written += len(pixels)

    def finish(self) -> Path:
        """Nowhere."""
        return Path()

    def abort(self) -> None:
        """Nothing is kept."""


def bench(
    job: RenderJob,
    *,
    chunks: int = 8,
    warm_up: int = WARM_UP_CHUNKS,
    tuning: Tuning | None = None,
    crew: Crew | None = None,
    startup: Startup | None = None,
    shelf: Shelf | None = None,
    reserve: Reserve | None = None,
    ahead: Reserve | None = None,
) -> BenchReport:
    """Runs `warm_up` chunks, then measures `chunks` more. crew: ranks that torchrun started, all of them used.

    startup: hears how far it is. shelf: see `Wiring`. reserve: rank processes that are on their way already. ahead:
    those of a later run, whose imports must be over before anything is measured.

    Raises `UsageError` for fewer than two chunks, and whatever building a pipeline raises.
    """
    from wanrt.pipeline.devices import choose_device, set_threads, wait_passively
    from wanrt.pipeline.models import timed
    from wanrt.pipeline.ranks import reserve_for

    startup = startup or Startup()
    if chunks < 2 or warm_up < 1:
        raise UsageError(f"bench of {chunks} chunks after {warm_up}: expected at least 2 after at least 1")
    wait_passively()
    with reserve or reserve_for(job, crew) as own:
        with timed(startup.heard, LIBRARY):
            device = choose_device(job.device)
        with timed(startup.heard, "devices"):
            job = settle_topology(job, device, None if crew is None else crew.world)
        set_threads(device)
        job = replace(job, frames=pixel_frames(CHUNK_LATENTS * (warm_up + chunks)))
        recorder = make_recorder(job, device, None)
        wiring = Wiring(recorder, progress=startup.heard, crew=crew, reserve=own, shelf=shelf)
        with one_line_errors():
            return _measure(job, warm_up, device, tuning or Tuning(), wiring, startup, ahead)


def _measure(
    job: RenderJob,
    warm_up: int,
    device: torch.device,
    tuning: Tuning,
    wiring: Wiring,
    startup: Startup,
    ahead: Reserve | None,
) -> BenchReport:
    recorder = wiring.recorder
    spec = VideoSpec(job.width, job.height, job.fps)
    wiring = replace(wiring, convert=converter(spec, PixelFormat.NV12, device))
    _forget_peak(device)
    began = time.perf_counter()
    pipeline = build_pipeline(job, find_files(job), device, wiring, tuning)
    if ahead is not None:
        ahead.wait()
    loaded = time.perf_counter()
    sink = QueuedSink(RecordedSink(DiscardingSink(spec), recorder))
    warmed = loaded
    assert job.chunks is not None
    startup.tell(f"making {warm_up} chunks to warm up, then {job.chunks - warm_up} to measure")
    try:
        for frames in pipeline.run():
            sink.write(frames.pixels)
            sink.flush_chunk()
            if frames.chunk == 0:
                startup.heard("first chunk", time.perf_counter() - loaded)
            warmed = time.perf_counter() if frames.chunk == warm_up - 1 else warmed
    finally:
        pipeline.close()
        sink.finish()
    _settle(device)
    spans = by_chunk(recorder, range(warm_up, job.chunks))
    seconds = loaded - began, warmed - loaded
    return report(job, spans, warm_up, seconds, _memory(device), tuning, startup.seconds)


def report(
    job: RenderJob,
    spans: Mapping[int, list[Span]],
    warm_up: int,
    seconds: tuple[float, float],
    memory: int | None,
    tuning: Tuning,
    startup: Mapping[str, float] | None = None,
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
        costs=StageCosts.of_chunks(one_rank, shared=job.topology == "single"),
        load_s=seconds[0],
        warm_up_s=seconds[1],
        memory_bytes=memory,
        startup=dict(startup or {}),
    )


def by_chunk(recorder: Recorder, chunks: range) -> dict[int, list[Span]]:
    """Outermost spans of these chunks."""
    found: dict[int, list[Span]] = {chunk: [] for chunk in chunks}
    for span in recorder.recent(float(10**6)):
        if span.chunk in found:
            found[span.chunk].append(span)
    return found


def table(reports: Iterable[BenchReport | Unmeasured]) -> str:
    """The scorecard's columns, one configuration a line, what is not included, and what could not be run."""
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
    about = f"medians of steady chunks, ms; not included: {', '.join(NOT_INCLUDED)}"
    return "\n".join([*lines, *_split_gains(found), *unmeasured, about])


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


def _settle(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    """What an earlier run needed at most is not counted as this one's."""
    import torch

    from wanrt.pipeline.shelf import give_back

    if device.type == "cuda" and torch.cuda.is_initialized():  # else there was none
        give_back()
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> int | None:
    import torch

    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Unmeasured:
    """A line of a matrix that could not be run, and why."""

    name: str
    reason: str

    def document(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


def run_bench(
    flags: Mapping[str, object],
    entries: Iterable[Entry],
    chunks: int,
    warm_up: int,
    tuning: Tuning,
    json: str | None,
    crew: Crew | None = None,
    say: Say = silent,
    started_ns: int | None = None,
) -> str:
    """What the command does: runs every entry in this process, returns the table, writes the JSON after each run.

    With several entries one that fails is a line with its reason; a single one raises. crew: as in `bench`; say,
    started_ns: as in `Startup`.
    """
    from wanrt.pipeline.shelf import Shelf
    from wanrt.telemetry.files import write_json

    wanted = tuple(entries)
    found: list[BenchReport | Unmeasured] = []
    shelf = Shelf()
    started_ns = time.perf_counter_ns() if started_ns is None else started_ns
    with ExitStack() as over:
        reserve = over.enter_context(_ranks_of(wanted[:1], flags, crew, context=True))
        for number, entry in enumerate(wanted, start=1):
            startup = Startup(say, started_ns)
            ahead = over.enter_context(_ranks_of(wanted[number : number + 1], flags, crew, context=False))
            if len(wanted) > 1:
                settled = replace(entry, topology=entry.topology or flags.get("topology"))  # type: ignore[arg-type]
                startup.tell(f"{settled.title} ({number} of {len(wanted)})")
            try:
                measured = _run_entry(
                    flags, entry, chunks, warm_up, tuning, crew, startup, shelf, reserve, ahead
                )
                startup.tell(_in_short(measured))
                found.append(measured)
            except WanrtError as error:
                if len(wanted) == 1:
                    raise
                found.append(Unmeasured(entry.title, str(error)))
                log.warning("%s: %s", entry.title, error)
            reserve = ahead
            if json is not None:
                runs = [
                    {"entry": done.text, **run.document()} for done, run in zip(wanted, found, strict=False)
                ]
                write_json(json, {"schema": 1, "runs": runs})
    return table(found)


def _ranks_of(
    entries: Sequence[Entry], flags: Mapping[str, object], crew: Crew | None, *, context: bool
) -> Reserve:
    """The rank processes of an entry, if there is one and it can be, on their way. context: see `reserve_for`."""
    from wanrt.parallel.reserve import Reserve
    from wanrt.pipeline.ranks import reserve_for

    with suppress(WanrtError):  # said when its turn comes
        for entry in entries:
            return reserve_for(job_of(flags, entry), crew, context=context)
    return Reserve()


def _run_entry(
    flags: Mapping[str, object],
    entry: Entry,
    chunks: int,
    warm_up: int,
    tuning: Tuning,
    crew: Crew | None,
    startup: Startup,
    shelf: Shelf,
    reserve: Reserve,
    ahead: Reserve,
) -> BenchReport:
    if not entry.p2p and "NCCL_P2P_DISABLE" not in os.environ:
        raise UsageError("no-p2p: NCCL is told before a process starts; set NCCL_P2P_DISABLE=1 for this one")
    job = job_of(flags, entry)
    if entry.compile is not None:
        tuning = replace(tuning, compile=entry.compile)
    measured = bench(
        job,
        chunks=chunks,
        warm_up=warm_up,
        tuning=tuning,
        crew=crew,
        startup=startup,
        shelf=shelf,
        reserve=reserve,
        ahead=ahead,
    )
    return replace(measured, name=entry.name or _name(measured.name, entry))


def _in_short(run: BenchReport) -> str:
    """A measured entry in one line."""
    return (
        f"{run.name}: {run.fps:.2f} fps, period {run.period.p50_ms:.1f} ms; "
        f"loaded in {run.load_s:.1f} s, warm {run.warm_up_s:.1f} s later"
    )


def _name(name: str, entry: Entry) -> str:
    """The report's own name, and what else tells the entry from others."""
    more = (entry.size, entry.precision, None if entry.p2p else NO_P2P)
    return " ".join((name, *(part for part in more if part)))


def job_of(flags: Mapping[str, object], entry: Entry) -> RenderJob:
    """The job of an entry. Raises `UsageError` for what cannot be."""
    from wanrt.script import build_job, read_script

    script = read_script("a red ball bouncing over a blue night sky")
    return build_job(script, {**flags, **entry.flags})
