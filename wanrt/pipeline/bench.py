"""`wanrt bench`: a pipeline without an encoder, warmed up, then measured in its steady state."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import UsageError, WanrtError
from wanrt.output import PixelFormat, QueuedSink, Sink, VideoSpec
from wanrt.parallel.team import LIBRARY
from wanrt.pipeline.assemble import build_pipeline
from wanrt.pipeline.bench_report import BenchReport, Unmeasured, by_chunk, report, table
from wanrt.pipeline.build import Tuning, Wiring, find_files, make_recorder, settle_topology
from wanrt.pipeline.context import CHUNK_LATENTS, pixel_frames
from wanrt.pipeline.encoding import RecordedSink
from wanrt.pipeline.matrix import NO_P2P, Entry, needs_own_process
from wanrt.pipeline.progress import timed
from wanrt.pipeline.run import converter, one_line_errors
from wanrt.pipeline.startup import Say, Startup, silent

if TYPE_CHECKING:
    import torch

    from wanrt.output.frames import Pixels
    from wanrt.parallel.crew import Crew
    from wanrt.parallel.reserve import Reserve
    from wanrt.pipeline.shelf import Shelf
    from wanrt.script import RenderJob

log = logging.getLogger("wanrt.pipeline")

WARM_UP_CHUNKS = 3  # shapes are static from the third chunk on with the usual window


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
    tokens = pipeline.most_tokens()
    spans = by_chunk(recorder, range(warm_up, job.chunks))
    seconds = loaded - began, warmed - loaded
    return report(job, spans, warm_up, seconds, _memory(device), tuning, startup.seconds, tokens)


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
    if needs_own_process(entry):
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
