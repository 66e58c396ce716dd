"""What rendering a file and streaming share: checked, loaded, made, finished, whatever happens on the way."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import OutputError, RunError, WanrtError
from wanrt.parallel.team import LIBRARY
from wanrt.pipeline.cancel import Cancel, CancelledError
from wanrt.pipeline.progress import timed

if TYPE_CHECKING:
    import torch

    from wanrt.output import PixelFormat, Sink, VideoSpec
    from wanrt.panel import Snapshot
    from wanrt.parallel.crew import Crew
    from wanrt.pipeline.loop import Frames, Pipeline
    from wanrt.pipeline.monitor import Monitor
    from wanrt.script import RenderJob
    from wanrt.telemetry import Recorder

log = logging.getLogger("wanrt.pipeline")


class Run(ABC):
    """One run from its checks to its finished outputs; the outputs are the subclass's."""

    def __init__(
        self,
        job: RenderJob,
        cancel: Cancel,
        monitor: Monitor,
        started_ns: int | None,
        crew: Crew | None = None,
    ) -> None:
        self._job, self._cancel, self._monitor, self._started_ns = job, cancel, monitor, started_ns
        self._crew = crew
        self._pipeline: Pipeline | None = None
        self._recorder: Recorder | None = None
        self._stopped = ""
        self._error: WanrtError | None = None

    def check(self) -> None:
        """Everything that can be refused within milliseconds: nothing heavy is imported for it."""
        from wanrt.telemetry.files import check_measurement

        others = self._check_outputs()
        for path in (self._job.stats, self._job.trace):
            if path is not None:
                check_measurement(path, others)
                others.add(path.absolute())

    def go(self) -> None:
        """Loads, makes, finishes, writes the measurements."""
        try:
            with one_line_errors(), ExitStack() as self._until_over:
                self._settle()
                self._make()
        except CancelledError as ended:
            self._stopped = str(ended)
            self._error = ended
        except WanrtError as failed:
            self._stopped = str(failed)
            self._error = failed
        self._write_measurements()
        if self._error is not None:
            raise self._error

    def _settle(self) -> None:
        """Files, device and topology; what can be refused without loading a model is refused here."""
        from wanrt.pipeline.devices import choose_device, wait_passively

        with self._cancel.raising_at_once(), timed(self._monitor.load, LIBRARY):
            wait_passively()
            from wanrt.pipeline.build import find_files, settle_topology

            self._files = find_files(self._job)
            from wanrt.pipeline.ranks import reserve_for

            self._reserve = self._until_over.enter_context(reserve_for(self._job, self._crew))
            self._device = choose_device(self._job.device)
        world = None if self._crew is None else self._crew.world
        self._job = settle_topology(self._job, self._device, world)

    def _make(self) -> None:
        from wanrt.pipeline.assemble import build_pipeline
        from wanrt.pipeline.build import Wiring, make_recorder
        from wanrt.pipeline.devices import set_threads

        self._check()
        job, device = self._job, self._device
        log.info("device %s, %d threads", device, set_threads(device))
        self._recorder = recorder = make_recorder(job, device, self._started_ns)
        sink = self._open_sink(recorder)
        try:
            convert = converter(sink.spec, sink.pixel_format, device)
            wiring = Wiring(recorder, self._check, self._monitor.load, convert, self._crew, self._reserve)
            self._pipeline = pipeline = build_pipeline(job, self._files, device, wiring)
            self._monitor.watch(recorder, lambda snapshot: self._numbers(snapshot, sink))
            self._pump(pipeline, sink)
        finally:
            self._monitor.finishing()
            try:
                self._finish(sink)  # first: ranks that hang must not keep the file from being whole
            finally:
                if self._pipeline is not None:
                    self._pipeline.close()

    def _pump(self, pipeline: Pipeline, sink: Sink) -> None:
        """Frames from the pipeline to the sink, to the last."""
        for frames in pipeline.run():
            sink.write(frames.pixels)
            sink.flush_chunk()
            self._monitor.delivered(frames)
            if not self._delivered(frames):
                return

    @abstractmethod
    def _check_outputs(self) -> set[Path]:
        """Refuses outputs that could not be written; returns the files among them, absolute."""

    @abstractmethod
    def _open_sink(self, recorder: Recorder) -> Sink:
        """Opens the outputs."""

    @abstractmethod
    def _finish(self, sink: Sink) -> None:
        """Completes the outputs."""

    @abstractmethod
    def _numbers(self, snapshot: Snapshot, sink: Sink) -> Snapshot:
        """The snapshot with what the outputs know."""

    def _check(self) -> None:
        """Raises to end the run; called between passes and between two files.

        A rank's failure first: torchrun ends the others by a signal then, which is not the cause.
        """
        if self._pipeline is not None:
            self._pipeline.check()
        self._cancel.check()

    def _delivered(self, frames: Frames) -> bool:
        """A chunk went to the outputs; whether to go on."""
        return True

    def _facts(self) -> Mapping[str, object]:
        """What stats and trace say of the run besides its job."""
        return {}

    def _write_measurements(self) -> None:
        if self._recorder is None:
            return
        for path, write in (
            (self._job.stats, self._recorder.write_stats),
            (self._job.trace, self._recorder.write_trace),
        ):
            if path is None:
                continue
            try:
                write(path, {**settings(self._job), **self._facts()})
            except OutputError as failed:
                self._error = self._error or failed


def converter(
    spec: VideoSpec, pixel_format: PixelFormat, device: torch.device
) -> Callable[[torch.Tensor], Any]:
    """What turns pixels into what a sink takes: on CUDA its own format, on its way to the host; else RGB."""
    from wanrt.output.frames import to_block
    from wanrt.pipeline.loop import to_rgb8

    if device.type != "cuda":
        return to_rgb8
    return lambda pixels: to_block(pixels[0].permute(1, 2, 3, 0), spec, pixel_format)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Out of memory, and anything unforeseen, as a `RunError` of one line; wanrt's own errors pass."""
    try:
        yield
    except WanrtError:
        raise
    except Exception as error:
        log.debug("the run failed", exc_info=error)
        raise RunError(_describe(error)) from error


def _describe(error: Exception) -> str:
    name = type(error).__name__
    words = " ".join(str(error).split())
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in words:
        return f"out of memory ({words[:160]}); choose a smaller --size or --window, or another --device"
    return f"unexpected {name}: {words[:300]} (--debug shows where)"


def settings(job: RenderJob) -> Mapping[str, object]:
    """What a run was made with, for stats and trace."""
    names = (
        "seed",
        "width",
        "height",
        "frames",
        "steps",
        "window",
        "bias",
        "anchor",
        "topology",
        "precision",
        "attention",
    )
    chosen = {name: getattr(job, name) for name in names}
    return {
        "preset": job.preset.name,
        **chosen,
        "fps": str(job.fps),
        "device": job.device,
        "random_weights": job.random_weights,
    }


def metadata(job: RenderJob) -> Mapping[str, object]:
    """What a file says about its making."""
    from wanrt import __version__

    about: dict[str, object] = {
        "prompt": " | ".join(scene_text(scene.prompts) for scene in job.timeline.scenes),
        "seed": job.seed,
        "preset": job.preset.name,
        "wanrt": __version__,
    }
    if job.title:
        about["title"] = job.title
    if job.random_weights:
        about["weights"] = "random: the picture means nothing"
    return about


def scene_text(prompts: tuple[tuple[str, float], ...]) -> str:
    """A scene's prompts in one line, with their weights where there are several."""
    if len(prompts) == 1:
        return prompts[0][0]
    return " + ".join(f"{weight:g} {text}" for text, weight in prompts)
