"""`stream`: a job to live targets and recordings, steered while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.parallel.team import LIBRARY
from wanrt.pipeline.cancel import Cancel, StoppedError
from wanrt.pipeline.run import Run, metadata
from wanrt.pipeline.signals import ending_on_signals

if TYPE_CHECKING:
    from wanrt.output import Sink
    from wanrt.output.live import LiveSink
    from wanrt.output.serve import PageServer
    from wanrt.panel import Live, Observer, Snapshot, Summary
    from wanrt.parallel.crew import Crew
    from wanrt.pipeline.control import Handler
    from wanrt.pipeline.loop import Frames
    from wanrt.pipeline.monitor import Monitor
    from wanrt.pipeline.session import Session
    from wanrt.script import RenderJob
    from wanrt.telemetry import Recorder

log = logging.getLogger("wanrt.pipeline")


@dataclass(frozen=True)
class StreamPlan:
    """Where a stream goes and how it is steered; what it shows is the job's.

    Attributes:
        targets: addresses, HLS playlists and files; secret, since addresses hold stream keys.
        pace: what viewers see when generation is slower: repeat, slow or blend.
        latency: seconds of video that may wait, before the encoder and again before each target's network.
        serve: host and port (0: any) of a page to watch and steer at; None: no page.
        name: of the run, for its control socket.
        exact_name: refuse when a run of that name is alive, instead of counting on.
        watch: a prompt file to follow, and what reads its job.
    """

    targets: tuple[str, ...] = field(default=(), repr=False)
    pace: str = "repeat"
    latency: float = 2.0
    serve: tuple[str, int] | None = None
    name: str = "stream"
    exact_name: bool = False
    watch: tuple[Path, Callable[[], RenderJob]] | None = None


@dataclass(frozen=True)
class StreamResult:
    """A stream that has ended. `outputs`: names of targets and files."""

    outputs: tuple[str, ...]
    frames: int
    chunks: int
    seconds: float


def stream(
    job: RenderJob,
    plan: StreamPlan,
    observer: Observer,
    *,
    cancel: Cancel | None = None,
    started_ns: int | None = None,
    crew: Crew | None = None,
    announce: Callable[[str], None] = lambda address: None,
) -> StreamResult:
    """Streams the video of `job` until its length is reached, somebody stops it, or a signal comes.

    Targets are checked before anything is loaded; `observer` is told how it goes, and closed. Recordings are
    finished however the stream ends. `crew`: ranks that torchrun started, which the topology must use up. `announce`
    is given the page's address, with its token, before anything loads.

    Raises `UsageError` or `WeightsError` before anything is made, `CancelledError` (exit code 130 or 143) after a
    signal, `RunError` or `OutputError` when the run failed, or no output was left to write to.
    """
    from wanrt.pipeline.live import LiveTimeline
    from wanrt.pipeline.monitor import Monitor
    from wanrt.pipeline.session import Session

    cancel, timeline = cancel or Cancel(), LiveTimeline(job.timeline)
    session = Session(job, timeline)
    live = replace(job, timeline=timeline, output=None)  # type: ignore[arg-type]
    monitor = Monitor(live, observer, started_ns, lambda: cancel.asked)
    run = _Stream(live, plan, session, observer, cancel, monitor, started_ns, crew)
    with ending_on_signals(cancel, launched=crew is not None):
        try:
            run.check()
            with ExitStack() as stack:
                run.steered(stack, announce)
                monitor.load(LIBRARY, None)
                monitor.start()
                stack.callback(monitor.stop)
                run.go()
        finally:
            observer.close(run.summary())
    return run.result()


class _Stream(Run):
    """One stream from its checks to its end."""

    def __init__(
        self,
        job: RenderJob,
        plan: StreamPlan,
        session: Session,
        observer: Observer,
        cancel: Cancel,
        monitor: Monitor,
        started_ns: int | None,
        crew: Crew | None = None,
    ) -> None:
        super().__init__(job, cancel, monitor, started_ns, crew)
        self._plan, self._session, self._observer = plan, session, observer
        self._page: PageServer | None = None
        self._live: LiveSink | None = None
        self._name = plan.name
        self._outputs: tuple[str, ...] = ()
        self._begun = False

    def _check_outputs(self) -> set[Path]:
        from wanrt.output import check_target
        from wanrt.output.address import Address
        from wanrt.output.open import is_live

        plan, files = self._plan, set()
        if not plan.targets and plan.serve is None:
            raise UsageError("nowhere to stream to: give --rtmp URL, --output TARGET or --serve")
        for target in plan.targets:
            if "://" in target:
                Address.parse(target)
            elif not is_live(target):
                path = check_target(target, self._job.force, self._job.codec).path.absolute()
                if path in files:
                    raise UsageError(f"{target}: named twice; every output needs a file of its own")
                files.add(path)
        return files

    def steered(self, stack: ExitStack, announce: Callable[[str], None]) -> None:
        """Opens the control socket, the page, the panel's input line and the file's watch; `stack` closes them."""
        from wanrt.pipeline.control import ControlServer
        from wanrt.pipeline.session import Commands

        plan = self._plan
        commands = Commands(self._session, self._status)
        server = ControlServer(plan.name, commands, exact=plan.exact_name)
        stack.callback(server.close)
        self._name = server.name
        if plan.serve is not None:
            from wanrt.output.serve import PageServer

            self._page = PageServer(self._session.say, self._status, host=plan.serve[0], port=plan.serve[1])
            stack.callback(self._page.close)
            announce(self._page.url)
        self._typed(commands, stack)
        if plan.watch is not None:
            from wanrt.pipeline.watch import FileWatch

            path, read = plan.watch
            session = self._session
            watch = FileWatch(path, read, session.follow, self._observer.log, session.fixed)
            stack.callback(watch.close)

    def _typed(self, commands: Handler, stack: ExitStack) -> None:
        """Prompts and commands from the panel, where there is one on a terminal with a keyboard."""
        from wanrt.panel.keyboard import Keyboard, keyboard_at
        from wanrt.pipeline.typed import InputLine

        terminal, line = keyboard_at(), InputLine(commands, self._observer.typing)
        if terminal is not None and line.show():
            stack.callback(Keyboard(terminal, line.take, line.resumed).close)

    def _open_sink(self, recorder: Recorder) -> Sink:
        from wanrt.output import VideoSpec, open_outputs
        from wanrt.output.live import LiveSink
        from wanrt.pipeline.encoding import RecordedSink

        job, plan = self._job, self._plan
        tee = open_outputs(
            plan.targets,
            VideoSpec(job.width, job.height, job.fps),
            pace=plan.pace,
            latency=plan.latency,
            page=self._page,
            codec=job.codec,
            **({} if job.quality is None else {"quality": job.quality}),  # type: ignore[arg-type]
            metadata=metadata(job),
            force=job.force,
        )
        self._live = next((sink for sink in tee.sinks if isinstance(sink, LiveSink)), None)
        self._session.watch(recorder)
        return RecordedSink(tee, recorder)

    def _check(self) -> None:
        super()._check()
        if self._session.stopping and not self._begun:
            raise StoppedError("stopped before the first chunk")

    def _delivered(self, frames: Frames) -> bool:
        self._begun = True
        ahead = 0.0 if self._live is None else self._live.state.waiting - frames.count / float(self._job.fps)
        self._session.delivered(frames.chunk, max(0.0, ahead))
        return self._session.proceed(self._check)

    def _finish(self, sink: Sink) -> None:
        """Ends the streams and completes the recordings with the whole chunks that were made."""
        if not sink.frames_written:
            sink.abort()
            return
        self._outputs = self._names()
        sink.finish()

    def _names(self) -> tuple[str, ...]:
        """Targets as they may be shown."""
        from wanrt.output.address import Address

        shown = [str(Address.parse(target)) if "://" in target else target for target in self._plan.targets]
        return (*shown, *([str(self._page.address)] if self._page else []))

    def _numbers(self, snapshot: Snapshot, sink: Sink) -> Snapshot:
        latencies = self._session.latencies
        return replace(
            snapshot,
            output=", ".join(self._names()),
            live=self._live_numbers(),
            paused=self._session.paused,
            prompt_to_pixel_s=latencies[-1] if latencies else None,
        )

    def _live_numbers(self) -> Live | None:
        from wanrt.panel import Live, LiveTarget

        if self._live is None:
            return None
        now = self._live.state
        targets = tuple(
            LiveTarget(t.name, str(t.phase), t.sent, t.dropped, t.connections, t.queued, t.error)
            for t in now.targets
        )
        return Live(now.repeated, now.late, now.stalls, now.waiting, now.blocked, targets)

    def _status(self) -> Mapping[str, object]:
        """What `wanrt status` and the page show."""
        now, job = self._monitor.snapshot(), self._job
        return {
            "run": self._name,
            "phase": "paused" if now.paused else str(now.phase),
            "prompt": now.prompt,
            "scene": now.scene,
            "chunk": now.chunk,
            "frames": now.frames_done,
            "frames_total": now.frames_total,
            "fps": _rounded(now.fps_now),
            "fps_mean": _rounded(now.fps_mean),
            "fps_stream": float(job.fps),
            "size": f"{job.width}x{job.height}",
            "preset": job.preset.name,
            "seed": self._session.seed,
            "elapsed_s": _rounded(now.elapsed_s),
            "chunk_s": _rounded(now.period_s),
            "prompt_to_pixel_s": _rounded(now.prompt_to_pixel_s),
            "live": None if now.live is None else asdict(now.live),
        }

    def _facts(self) -> Mapping[str, object]:
        live, latencies = self._live_numbers(), self._session.latencies
        return {
            "outputs": self._names(),
            "pace": self._plan.pace,
            "latency_s": self._plan.latency,
            "prompt_to_pixel_s": [round(seconds, 3) for seconds in latencies],
            "live": None if live is None else asdict(live),
        }

    def summary(self) -> Summary | None:
        """How it ended, for the observer; None when there is no video to speak of."""
        from wanrt.panel import Summary

        if self._recorder is None or not self._outputs:
            return None
        stats = self._recorder.stats()
        return Summary(
            output=", ".join(self._outputs),
            frames=stats.frames,
            seconds=stats.wall_s,
            fps=stats.fps_mean,
            video_seconds=float(stats.frames / self._job.fps),
            time_to_first_frame_s=stats.time_to_first_frame_s,
            stopped=self._stopped,
            notes=("random weights: the picture means nothing",) if self._job.random_weights else (),
        )

    def result(self) -> StreamResult:
        """What `stream` returns."""
        assert self._recorder is not None
        stats = self._recorder.stats()
        return StreamResult(self._outputs, stats.frames, stats.chunks, stats.wall_s)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
