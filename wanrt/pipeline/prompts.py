"""Stage 0's text half: which embedding a chunk is conditioned on, encoded once and blended on demand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from wanrt.pipeline.conditioning import blend, mix
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    import torch

STAGE = "stage0"
KEPT = 32  # encoded prompts kept: 4 MiB each for UMT5-XXL in bf16

Weighted = tuple[tuple[str, float], ...]


class Conditioning(Protocol):
    """What a chunk is conditioned on: a weighted blend of prompts, or a point on the way between two of them."""

    @property
    def prompts(self) -> Weighted:
        """Texts with weights."""
        ...

    @property
    def blend_from(self) -> Weighted | None:
        """The prompts that the way starts from; None off a transition."""
        ...

    @property
    def blend_fraction(self) -> float:
        """How far along the way, 0..1."""
        ...

    @property
    def curve(self) -> str:
        """lerp or slerp."""
        ...

    @property
    def bias(self) -> float | None:
        """The scene's own attention bias; None for the job's."""
        ...

    @property
    def steps(self) -> tuple[float, ...] | None:
        """The scene's own timesteps; None for the job's."""
        ...

    @property
    def seed(self) -> int | None:
        """Another seed than the job's, or None."""
        ...


class Timeline(Protocol):
    """Says what each chunk is conditioned on; pure."""

    def at(self, chunk: int) -> Conditioning:
        """Conditioning of chunk number `chunk`."""
        ...


class PromptBook:
    """Turns a timeline into embeddings `[1, L, text_dim]`, and says nothing while nothing changes."""

    def __init__(self, timeline: Timeline, encode: Callable[[str], torch.Tensor], recorder: Recorder) -> None:
        self._timeline, self._encode, self._recorder = timeline, encode, recorder
        self._encoded: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._said: tuple[object, ...] | None = None

    def changed(self, chunk: int) -> torch.Tensor | None:
        """The embedding for `chunk`, or None when it is the one asked for last."""
        import torch

        now = self._timeline.at(chunk)
        key = (now.prompts, now.blend_from, now.blend_fraction, str(now.curve))
        if key == self._said:
            return None
        with torch.inference_mode(), self._recorder.span(STAGE, "prompt", chunk):
            embedding = self._embedding(now, chunk)
        self._said = key
        self._recorder.prompt(chunk, " + ".join(text for text, _ in now.prompts))
        return embedding

    def most_tokens(self) -> int | None:
        """Of the longest prompt that is kept, its end mark included; None: there is none yet. Waits for the device."""
        kept = self._encoded.values()
        return max((int(embedding.ne(0).any(-1).sum(-1).max()) for embedding in kept), default=None)

    def _embedding(self, now: Conditioning, chunk: int) -> torch.Tensor:
        target = self._weighted(now.prompts, chunk)
        if now.blend_from is None or now.blend_fraction >= 1.0:
            return target
        return mix(self._weighted(now.blend_from, chunk), target, now.blend_fraction, now.curve)

    def _weighted(self, prompts: Weighted, chunk: int) -> torch.Tensor:
        return blend([self._one(text, chunk) for text, _ in prompts], [weight for _, weight in prompts])

    def _one(self, text: str, chunk: int) -> torch.Tensor:
        if text not in self._encoded:
            with self._recorder.span(STAGE, "text-encode", chunk):
                self._encoded[text] = self._encode(text)
            while len(self._encoded) > KEPT:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(text)
        return self._encoded[text]
