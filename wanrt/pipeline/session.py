"""Steering a stream while it runs: one place for the control socket, the page and the panel's input line."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from wanrt.errors import UsageError
from wanrt.script import units
from wanrt.script.build import steps_of
from wanrt.script.preset import CacheKind
from wanrt.script.schema import blend as read_blend

if TYPE_CHECKING:
    from wanrt.pipeline.live import LiveTimeline
    from wanrt.script import RenderJob
    from wanrt.telemetry import Recorder

log = logging.getLogger("wanrt.pipeline")

DEFAULT_BLEND = Fraction(1)  # seconds: two or three chunks, so that a said prompt neither cuts nor drags


class Session:
    """One stream's steering. Every method may be called from any thread.

    Args:
        job: with the file's own bias, steps and rate.
        timeline: what the pipeline asks; the job's.
        clock: seconds, monotonic.
    """

    def __init__(
        self, job: RenderJob, timeline: LiveTimeline, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job, self._timeline, self._clock = job, timeline, clock
        self._recorder: Recorder | None = None
        self._going = threading.Event()
        self._going.set()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._said: deque[tuple[int, float]] = deque(maxlen=64)
        self._latencies: deque[float] = deque(maxlen=64)
        self.seed = job.seed

    # --- what people ask for ---------------------------------------------------------------------------------

    def say(self, prompts: object, blend: object = None) -> int:
        """Shows `prompts` (text, or texts with weights) from now on, reached over `blend` seconds (None: 1 s).

        Returns the first chunk that shows it. Raises `UsageError` for what is no prompt or no time.
        """
        texts = _checked("prompt", read_blend, prompts)
        seconds = DEFAULT_BLEND if blend is None else _checked("blend", _seconds, blend)
        with self._lock:
            chunk = self._timeline.say(texts, seconds * self._job.fps)
            self._said.append((chunk, self._clock()))
        if self._recorder is not None:
            self._recorder.prompt(chunk, " + ".join(text for text, _ in texts))
        return chunk

    def set(self, *, bias: object = None, steps: object = None) -> int:
        """Bias or steps from now on; returns the first chunk made so. Raises `UsageError` for wrong values."""
        preset = self._job.preset
        if bias is None and steps is None:
            raise UsageError("set: nothing given; expected bias=NUMBER or steps=LIST")
        if bias is not None and preset.cache.policy is not CacheKind.RECOMPUTE:
            raise UsageError(f"bias: {preset.name} keeps a {preset.cache.policy} cache and takes none")
        number = None if bias is None else _checked("bias", _bias, bias)
        times = None if steps is None else steps_of(preset, _checked("steps", units.steps, steps))
        return self._timeline.set(bias=number, steps=times)

    def reseed(self, seed: object) -> int:
        """Another seed from now on; returns the first chunk made with it."""
        number = _checked("seed", units.seed, seed)
        chunk = self._timeline.set(seed=number)
        self.seed = number
        return chunk

    def fixed(self, job: RenderJob) -> tuple[str, ...]:
        """The keys in which an edited file's job differs from this stream's, and which no running stream changes."""
        mine = _fixed(self._job)
        return tuple(key for key, value in _fixed(job).items() if value != mine[key])

    def follow(self, job: RenderJob) -> int:
        """Takes an edited file's scenes, seed, bias and steps; returns the first chunk made with them.

        Raises `UsageError` for another preset or rate: steps, bias and durations of the file are then meant for those.
        """
        from dataclasses import replace

        from wanrt.script import Timeline

        if others := [key for key in self.fixed(job) if key in ("preset", "fps")]:
            raise UsageError(
                f"{' and '.join(others)}: cannot change while it streams; restart the stream for that"
            )
        scenes = tuple(
            replace(
                scene,
                bias=job.bias if scene.bias is None else scene.bias,
                steps=job.steps if scene.steps is None else scene.steps,
            )
            for scene in job.timeline.scenes
        )
        chunk = self._timeline.follow(Timeline(scenes))
        if job.seed != self._job.seed:
            self.reseed(job.seed)
        return chunk

    def pause(self) -> None:
        """Makes no further chunk; what streams holds its last frame."""
        self._going.clear()

    def resume(self) -> None:
        """Goes on."""
        self._going.set()

    def stop(self) -> None:
        """Ends the stream after the chunk under way."""
        self._stop.set()
        self._going.set()

    # --- what the run does -----------------------------------------------------------------------------------

    def watch(self, recorder: Recorder) -> None:
        """Prompts are noted there from now on."""
        self._recorder = recorder

    def delivered(self, chunk: int, queued: float = 0.0) -> None:
        """The first frame of `chunk` will be seen in `queued` seconds."""
        with self._lock:
            while self._said and self._said[0][0] <= chunk:
                self._latencies.append(self._clock() - self._said.popleft()[1] + queued)

    def proceed(self, check: Callable[[], None], poll_s: float = 0.1) -> bool:
        """Waits while paused; False at the end. `check` is called first and meanwhile; it may raise."""
        check()
        while not self._going.wait(poll_s):
            check()
        return not self._stop.is_set()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was asked for."""
        return self._stop.is_set()

    @property
    def paused(self) -> bool:
        """Whether `pause` holds."""
        return not self._going.is_set()

    @property
    def latencies(self) -> tuple[float, ...]:
        """Seconds from a prompt said to its first frame seen, newest last."""
        with self._lock:
            return tuple(self._latencies)


class Commands:
    """The control socket's commands on a session. `status`: what `wanrt status` shows."""

    def __init__(self, session: Session, status: Callable[[], Mapping[str, object]]) -> None:
        self._session, self._status = session, status

    def __call__(self, command: str, fields: Mapping[str, Any]) -> Mapping[str, object]:
        """Obeys one command. Raises `UsageError` for an unknown one, or fields that it does not have."""
        known: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], Mapping[str, object]]]] = {
            "say": ({"prompt", "blend"}, self._say),
            "set": ({"bias", "steps"}, lambda given: {"chunk": self._session.set(**given)}),
            "seed": ({"seed"}, lambda given: {"chunk": self._session.reseed(given.get("seed"))}),
            "pause": (set(), lambda given: self._plain(self._session.pause)),
            "resume": (set(), lambda given: self._plain(self._session.resume)),
            "stop": (set(), lambda given: self._plain(self._session.stop)),
            "status": (set(), lambda given: self._status()),
        }
        if command not in known:
            raise UsageError(f"command {command[:40]!r}: expected one of {', '.join(known)}")
        allowed, act = known[command]
        if unknown := set(fields) - allowed:
            takes = ", ".join(sorted(allowed)) or "nothing else"
            raise UsageError(f"{command}: got {', '.join(sorted(unknown))[:80]}; it takes {takes}")
        log.info("control: %s", command)
        return act(fields)

    def _say(self, given: Mapping[str, Any]) -> Mapping[str, object]:
        return {"chunk": self._session.say(given.get("prompt"), given.get("blend"))}

    @staticmethod
    def _plain(act: Callable[[], None]) -> Mapping[str, object]:
        act()
        return {}


def _fixed(job: RenderJob) -> dict[str, object]:
    """What a stream keeps from its start to its end, by the keys of prompt files."""
    return {
        "preset": job.preset.name,
        "size": (job.width, job.height),
        "fps": job.fps,
        "duration": None if job.frames is None else job.frames / job.fps,
        **{
            key: getattr(job, key)
            for key in ("window", "anchor", "topology", "precision", "device", "weights")
        },
        **{key: getattr(job, key) for key in ("codec", "quality", "title", "random_weights")},
    }


def _checked(name: str, read: Callable[[Any], Any], value: object) -> Any:
    """The value, or `UsageError` with what was got and what is allowed."""
    try:
        return read(value)
    except units.Expected as bad:
        raise UsageError(f"{name}: got {units.show(value)}; expected {bad}") from None


def _seconds(value: object) -> Fraction:
    return units.duration(value, zero=True)


def _bias(value: object) -> float:
    return units.between(value, 0, 1, "a KV attention bias (1 is off)", above=True)
