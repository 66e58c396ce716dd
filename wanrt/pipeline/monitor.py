"""Tells an observer how a run is going, a few times a second, from a thread that only reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from wanrt.panel import LoadStep, Observer, Phase, Snapshot, delay, memory_now, stage_rows
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    from wanrt.pipeline.loop import Frames
    from wanrt.script import RenderJob

INTERVAL_S = 0.25
MEMORY_EVERY = 4  # snapshots between two looks at /proc


class Monitor:
    """Snapshots of one run. The run calls `load`, `watch` and `delivered`; the thread does the rest."""

    def __init__(
        self,
        job: RenderJob,
        observer: Observer,
        started_ns: int | None = None,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        """`started_ns` (`time.perf_counter_ns`): when the command began; default now. `ending`: whether the run was
        asked to end, which it may take seconds to do: until then its user sees that it was heard.
        """
        self._ending = ending
        self._job, self._observer = job, observer
        self._started_ns = time.perf_counter_ns() if started_ns is None else started_ns
        self._recorder: Recorder | None = None
        self._numbers: Callable[[Snapshot], Snapshot] = lambda snapshot: snapshot
        self._steps: dict[str, LoadStep] = {}
        self._began_s: dict[str, float] = {}
        self._chunk: int | None = None
        self._phase = Phase.LOADING
        self._memory = memory_now()
        self._ticks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wanrt-monitor", daemon=True)

    def start(self) -> None:
        """Shows a first snapshot and starts the thread."""
        self._observer.update(self.snapshot())
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and shows a last snapshot."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._observer.update(self.snapshot())

    def load(self, part: str, seconds: float | None, fraction: float | None = None) -> None:
        """Loading of `part` begins (`seconds` None), gets on (so is `fraction` of it, 0..1) or is done."""
        state = "active" if seconds is None else "done"
        self._began_s.setdefault(part, self._elapsed_s())
        step = LoadStep(part, state, fraction, seconds=seconds)  # type: ignore[arg-type]
        self._steps = {**self._steps, part: step}

    def watch(self, recorder: Recorder, numbers: Callable[[Snapshot], Snapshot]) -> None:
        """Loading is over: `recorder` knows how it goes from now on, and `numbers` adds what the outputs know."""
        self._recorder, self._numbers = recorder, numbers
        self._phase = Phase.RUNNING

    def delivered(self, frames: Frames) -> None:
        """A chunk went to the sink."""
        self._chunk = frames.chunk

    def finishing(self) -> None:
        """The last frame is made; the file is being completed."""
        self._phase = Phase.FINISHING

    def snapshot(self) -> Snapshot:
        """The state of the run now."""
        job = self._job
        subtitle = f"{job.preset.name} {job.width}x{job.height} seed {job.seed}"
        base = Snapshot(
            phase=Phase.FINISHING if self._phase is Phase.RUNNING and self._ending() else self._phase,
            elapsed_s=self._elapsed_s(),
            title=job.title,
            subtitle=subtitle,
            output=str(job.output or ""),
            frames_total=job.frames,
            fps_target=float(job.fps),
            memory=self._memory,
            load=tuple(self._ticking(step) for step in self._steps.values()),
            warnings=job.notes,
        )
        if self._recorder is None:
            return base
        return self._numbers(self._with_scene(self._with_stages(base, self._recorder)))

    def _elapsed_s(self) -> float:
        return (time.perf_counter_ns() - self._started_ns) / 1e9

    def _ticking(self, step: LoadStep) -> LoadStep:
        """A step under way with the seconds it has taken so far."""
        if step.state != "active":
            return step
        return replace(step, seconds=self._elapsed_s() - self._began_s[step.name])

    def _with_stages(self, base: Snapshot, recorder: Recorder) -> Snapshot:
        stats = recorder.stats()
        return replace(
            base,
            elapsed_s=stats.wall_s,
            frames_done=stats.frames,
            fps_now=stats.fps_now,
            fps_mean=stats.fps_mean,
            time_to_first_frame_s=stats.time_to_first_frame_s,
            chunk=self._chunk,
            period_s=stats.period.p50_ms / 1e3 if stats.period.p50_ms else None,
            stages=stage_rows(recorder, stats),
            delay_s=delay(recorder, stats),
        )

    def _with_scene(self, base: Snapshot) -> Snapshot:
        timeline = self._job.timeline
        now = timeline.at(self._chunk or 0)
        before = max(now.blend_from, key=lambda pair: pair[1])[0] if now.blend_from else None
        return replace(
            base,
            scene=now.scene + 1,
            scenes=max(now.scene + 1, len(timeline.scenes)),
            prompt=now.text,
            blend_from=before,
            blend=now.blend_fraction if before else None,
        )

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._ticks += 1
            if self._ticks % MEMORY_EVERY == 0:
                self._memory = memory_now()
            self._observer.update(self.snapshot())
