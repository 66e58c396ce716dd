"""A timeline that is changed while the video is made.

Chunks that the pipeline has asked for are made as they were answered; a change holds from the next one on. Asking
twice gives the same answer, so that panel and loop may both ask.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from fractions import Fraction

from wanrt.errors import UsageError
from wanrt.script import Conditioning, Curve, Scene, Timeline, chunk_frames, first_frame
from wanrt.script.timeline import Blend

REMEMBERED = 64  # answers kept for chunks gone by: far more than are under way


@dataclass(frozen=True)
class _Said:
    """A prompt that came from outside: where it begins, what it comes from, and how slowly."""

    prompts: Blend
    start_chunk: int
    source: Blend
    ramp: Fraction
    curve: Curve
    scene: int

    def at(self, chunk: int) -> Conditioning:
        """The ramp's value in the middle of the chunk, as for the scenes of a file."""
        middle = first_frame(chunk) - first_frame(self.start_chunk) + Fraction(chunk_frames(chunk), 2)
        fraction = min(Fraction(1), middle / self.ramp) if self.ramp > 0 else Fraction(1)
        if fraction >= 1:
            return Conditioning(self.prompts, curve=self.curve, scene=self.scene)
        return Conditioning(self.prompts, self.source, float(fraction), self.curve, self.scene)


class LiveTimeline:
    """A file's timeline that `say` leaves for good and `set` adjusts. Every method may be called from any thread.

    It stands in for `Timeline`: `at`, `scenes`.
    """

    def __init__(self, file: Timeline) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._answers: dict[int, Conditioning] = {}
        self._next = 0
        self._said: _Said | None = None
        self._count = len(file.scenes)
        self._bias: float | None = None
        self._steps: tuple[float, ...] | None = None
        self._seed: int | None = None

    def __reduce__(self) -> tuple[type[LiveTimeline], tuple[Timeline]]:
        """In another process it begins as the file: a mesh's ranks hear of changes with each chunk."""
        return LiveTimeline, (self._file,)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The file's scenes."""
        return self._file.scenes

    def at(self, chunk: int) -> Conditioning:
        """What chunk `chunk` is conditioned on; from then on that is settled."""
        with self._lock:
            if chunk not in self._answers:
                self._answers[chunk] = self._now(chunk)
                self._next = max(self._next, chunk + 1)
                self._answers.pop(chunk - REMEMBERED, None)
            return self._answers[chunk]

    def say(self, prompts: Blend, ramp: Fraction = Fraction(0), curve: Curve = Curve.LERP) -> int:
        """From now on `prompts`, reached over `ramp` pixel frames; returns the first chunk that shows it.

        In the middle of a transition the way begins at the mixture reached. Raises `UsageError` for no prompt.
        """
        if not prompts or not all(text.strip() for text, _ in prompts):
            raise UsageError("a prompt is empty: say what to show")
        with self._lock:
            chunk = self._next
            source = mixture(self._now(chunk))
            self._said = _Said(prompts, chunk, source, ramp, curve, self._count)
            self._count += 1
            return chunk

    def set(
        self, *, bias: float | None = None, steps: tuple[float, ...] | None = None, seed: int | None = None
    ) -> int:
        """From now on this bias, these steps or this seed, whatever the file says; returns the first chunk made so.

        Raises `UsageError` for a bias outside 0..1, steps that do not fall, or a seed below 0.
        """
        from wanrt.pipeline.schedule import Schedule

        if bias is not None and not 0 < bias <= 1:
            raise UsageError(f"bias {bias}: expected a number above 0, at most 1")
        if steps is not None:
            Schedule.of(steps, 1.0)
        if seed is not None and not 0 <= seed < 2**63:
            raise UsageError(f"seed {seed}: expected 0 to 2^63-1")
        with self._lock:
            self._bias = self._bias if bias is None else bias
            self._steps = self._steps if steps is None else steps
            self._seed = self._seed if seed is None else seed
            return self._next

    def follow(self, file: Timeline) -> int:
        """Takes another file's timeline, as if it had been there from the start; returns the first chunk of it."""
        with self._lock:
            self._file, self._said, self._count = file, None, len(file.scenes)
            return self._next

    def _now(self, chunk: int) -> Conditioning:
        said = self._said
        base = self._file.at(chunk) if said is None else said.at(chunk)
        bias = base.bias if self._bias is None else self._bias
        steps = base.steps if self._steps is None else self._steps
        return replace(base, bias=bias, steps=steps, seed=self._seed)


def mixture(now: Conditioning) -> Blend:
    """A conditioning as one weighted blend: of a transition, its two ends by how far it has come."""
    if now.blend_from is None:
        return now.prompts
    parts: dict[str, float] = {}
    for share, blend in ((1.0 - now.blend_fraction, now.blend_from), (now.blend_fraction, now.prompts)):
        for text, weight in blend:
            parts[text] = parts.get(text, 0.0) + share * weight
    return tuple(parts.items())
