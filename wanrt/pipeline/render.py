"""`render`: a job to a finished file, whatever happens on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.parallel.team import LIBRARY
from wanrt.pipeline.cancel import Cancel
from wanrt.pipeline.run import Run, metadata
from wanrt.pipeline.signals import ending_on_signals

if TYPE_CHECKING:
    from wanrt.output import QueuedSink, Sink
    from wanrt.panel import Observer, Snapshot, Summary
    from wanrt.parallel.crew import Crew
    from wanrt.script import RenderJob
    from wanrt.telemetry import Recorder


@dataclass(frozen=True)
class RenderResult:
    """A finished render. `seconds`: of the whole call; `fps`: pixel frames per second after the first chunk."""

    output: Path
    frames: int
    chunks: int
    seconds: float
    fps: float | None
    time_to_first_frame_s: float | None


def render(
    job: RenderJob,
    observer: Observer,
    *,
    cancel: Cancel | None = None,
    started_ns: int | None = None,
    crew: Crew | None = None,
) -> RenderResult:
    """Makes the video of `job`, tells `observer` how it goes, and closes it.

    The target is checked before anything is loaded. Whatever ends the run (a signal, `cancel`, an error), frames
    made so far are in a finished file. `started_ns` (`time.perf_counter_ns`): when the command began, for the
    time to the first frame. `crew`: ranks that torchrun started, which the topology must use up.

    Raises `UsageError` or `WeightsError` before anything is made, `CancelledError` (exit code 130 or 143) when the
    run was asked to end, `RunError` or `OutputError` when it failed.
    """
    from wanrt.pipeline.monitor import Monitor

    cancel = cancel or Cancel()
    monitor = Monitor(job, observer, started_ns, lambda: cancel.asked)
    with ending_on_signals(cancel, launched=crew is not None):
        run = _Render(job, cancel, monitor, started_ns, crew)
        try:
            run.check()
            monitor.load(LIBRARY, None)  # before the first snapshot, which would be empty without it
            monitor.start()
            run.go()
        finally:
            monitor.stop()
            observer.close(run.summary())
    return run.result()


class _Render(Run):
    """One render from its checks to its finished file."""

    _output: Path | None = None  # the finished file

    def _check_outputs(self) -> set[Path]:
        from wanrt.output import check_target

        job = self._job
        if job.output is None:
            raise UsageError("no output file; name one with -o FILE.mp4")
        check_target(job.output, job.force, job.codec)
        return {job.output.absolute()}

    def _open_sink(self, recorder: Recorder) -> QueuedSink:
        job = self._job
        assert job.output is not None
        from wanrt.output import QueuedSink, VideoSpec, open_sink
        from wanrt.pipeline.encoding import RecordedSink

        sink = open_sink(
            job.output,
            VideoSpec(job.width, job.height, job.fps),
            codec=job.codec,
            **({} if job.quality is None else {"quality": job.quality}),  # type: ignore[arg-type]
            metadata=metadata(job),
            force=job.force,
        )
        return QueuedSink(RecordedSink(sink, recorder))

    def _numbers(self, snapshot: Snapshot, sink: Sink) -> Snapshot:
        from wanrt.output import QueuedSink
        from wanrt.panel import Queue

        assert isinstance(sink, QueuedSink)
        queue = sink.state
        return replace(
            snapshot,
            queues=(Queue("encoder", queue.depth, queue.capacity),),
            encoder_lag_s=queue.depth / float(self._job.fps),
        )

    def _finish(self, sink: Sink) -> None:
        """Completes the file with the whole chunks that were made; without any, leaves nothing behind."""
        if sink.frames_written:
            self._output = sink.finish()
        else:
            sink.abort()

    def summary(self) -> Summary | None:
        """How it ended, for the observer; None when there is no video to speak of."""
        from wanrt.panel import Summary

        if self._recorder is None or self._output is None:
            return None
        stats = self._recorder.stats()
        return Summary(
            output=str(self._output),
            frames=stats.frames,
            seconds=stats.wall_s,
            fps=stats.fps_mean,
            size=self._output.stat().st_size if self._output.is_file() else None,
            video_seconds=float(stats.frames / self._job.fps),
            time_to_first_frame_s=stats.time_to_first_frame_s,
            stopped=self._stopped,
            notes=("random weights: the picture means nothing",) if self._job.random_weights else (),
        )

    def result(self) -> RenderResult:
        """What `render` returns."""
        assert self._recorder is not None
        assert self._output is not None
        stats = self._recorder.stats()
        return RenderResult(
            self._output,
            stats.frames,
            stats.chunks,
            stats.wall_s,
            stats.fps_mean,
            stats.time_to_first_frame_s,
        )
