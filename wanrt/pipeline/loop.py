"""The chunk loop: stage 0 and a mesh, an anchor policy between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanrt.errors import RunError
from wanrt.pipeline.context import (
    CHUNK_LATENTS,
    AnchorPolicy,
    chunks_for,
    context_plan,
    latents_for,
    pixel_frames,
)
from wanrt.pipeline.envelope import ChunkRequest, ChunkResult, Control, MeshHandle, all_finite
from wanrt.pipeline.heap import settled_heap
from wanrt.pipeline.lanes import Flag, Lanes, OneLane
from wanrt.pipeline.pixels import PixelStage
from wanrt.pipeline.prompts import PromptBook, Timeline
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    import torch

STAGE = "stage0"


@dataclass(frozen=True)
class Frames:
    """Pixel frames of one chunk, ready to be shown.

    `pixels` is what the pipeline's `convert` gives: uint8 RGB `[T, H, W, 3]` on the CPU unless told otherwise.
    """

    pixels: Any
    chunk: int
    first_frame: int  # index of the first of them in the video
    count: int


@dataclass(frozen=True)
class LoopSettings:
    """What the loop decides by."""

    policy: AnchorPolicy
    window: int
    recompute: bool
    frames: int | None  # exact number to deliver; None: for ever
    steps: tuple[float, ...]  # where a scene has none of its own
    bias: float = 1.0

    @property
    def chunks(self) -> int | None:
        """Chunks to make; None: for ever."""
        return None if self.frames is None else chunks_for(self.frames)

    @property
    def anchors(self) -> bool:
        """Whether chunks are conditioned on an encoded anchor."""
        return self.recompute and self.policy.encodes


def to_rgb8(pixels: torch.Tensor) -> torch.Tensor:
    """`[1, 3, T, H, W]` in -1..1 to uint8 `[T, H, W, 3]`: 127.5 (x + 1), rounded half to even, clamped."""
    import torch

    with torch.inference_mode():
        scaled = pixels[0].float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
        return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


class Pipeline:
    """One stream: prompts in, frames out, for ever or for an exact number of frames."""

    def __init__(
        self,
        timeline: Timeline,
        prompts: PromptBook,
        pixels: PixelStage,
        mesh: MeshHandle,
        settings: LoopSettings,
        recorder: Recorder,
        convert: Callable[[torch.Tensor], Any] = to_rgb8,
        lanes: Lanes | None = None,
    ) -> None:
        self._timeline, self._prompts, self._pixels, self._mesh = timeline, prompts, pixels, mesh
        self._control: Control | None = None
        self._settings, self._recorder, self._convert = settings, recorder, convert
        self._lanes = lanes or OneLane()

    def most_tokens(self) -> int | None:
        """See `PromptBook.most_tokens`."""
        return self._prompts.most_tokens()

    def run(self) -> Iterator[Frames]:
        """Frames chunk by chunk.

        On CUDA a chunk's frames are given out one chunk late in the host's order, and no later in time: the host
        queues the path to chunk N + 1 while the device makes chunk N, looks at chunk N - 1's NaN flag when the
        device has passed it, and thus never runs ahead by more than a chunk. Raises `RunError` for a chunk with
        NaN or Inf, before its frames are given out.
        """
        with settled_heap():
            yield from self._run()

    def _run(self) -> Iterator[Frames]:
        policy = self._settings.policy
        held: _Shown | None = None
        self._hand_over(self._request(0))
        for chunk in self._chunks():
            result, flag = self._receive()
            if held is not None:
                yield held.checked(self._mesh.check)
            if policy in (AnchorPolicy.DECODE_ALL, AnchorPolicy.OVERLAP):
                self._decode_all()
            if policy is AnchorPolicy.DECODE_ALL:
                held = self._show(result, flag)
            else:
                held = self._submit_and_show(chunk, result, flag)
            if held.known:
                yield held.checked(self._mesh.check)
                held = None
            if policy is AnchorPolicy.DECODE_ALL:
                self._submit_after(chunk)
        if held is not None:
            yield held.checked(self._mesh.check)

    def _submit_and_show(self, chunk: int, result: ChunkResult, flag: Flag) -> _Shown:
        """The next chunk on its way, and this one's frames.

        The mesh comes first, but where queueing its passes would keep the host: a device takes a few graphs ahead,
        then the host waits for all but the last of them, and display work that is queued after that ends too late to
        leave the decoder free for the next anchor (H100, 576x320: 10 ms a chunk).
        """
        request = self._request_after(chunk)
        show_first = self._mesh.launches_here and self._lanes.apart
        shown = self._show(result, flag) if show_first else None
        self._hand_over(request)
        return shown or self._show(result, flag)

    def check(self) -> None:
        """Raises `RunError` when a rank of the mesh has failed or died."""
        self._mesh.check()

    def close(self) -> None:
        """Ends the mesh; safe to call twice."""
        self._mesh.close()

    def _receive(self) -> tuple[ChunkResult, Flag]:
        with self._lanes.main():
            result = self._mesh.receive()
            flag = Flag(result.finite)
            frames = self._settings.frames
            self._pixels.take(result, None if frames is None else latents_for(frames))
            self._lanes.mark()
        return result, flag

    def _decode_all(self) -> None:
        with self._lanes.main():
            self._lanes.join()
            self._pixels.decode_rest()
            self._lanes.mark()

    def _chunks(self) -> Iterator[int]:
        chunks = self._settings.chunks
        return itertools.count() if chunks is None else iter(range(chunks))

    def _submit_after(self, chunk: int) -> None:
        self._hand_over(self._request_after(chunk))

    def _request_after(self, chunk: int) -> ChunkRequest | None:
        """What the chunk after `chunk` needs; None behind the last one."""
        last = self._settings.chunks is not None and chunk + 1 >= self._settings.chunks
        return None if last else self._request(chunk + 1)

    def _request(self, chunk: int) -> ChunkRequest:
        self._set_text(chunk)
        with self._lanes.main():
            anchor = None
            if self._settings.anchors:
                latent = context_plan(chunk, self._settings.window, self._settings.policy).anchor
                anchor = None if latent is None else self._pixels.anchor(latent)
                self._lanes.mark()
            return ChunkRequest(chunk, anchor, self._changed(chunk))

    def _set_text(self, chunk: int) -> None:
        """A changed prompt goes first: encoded while the mesh makes the chunk before, taken in behind that."""
        with self._lanes.ahead():
            embedding = self._prompts.changed(chunk)
        if embedding is not None:
            with self._lanes.main():
                self._mesh.set_text(chunk, self._lanes.share(embedding))

    def _hand_over(self, request: ChunkRequest | None) -> None:
        if request is not None:
            with self._lanes.main():
                self._mesh.submit(request)

    def _changed(self, chunk: int) -> Control | None:
        """The control for `chunk`, or None when it is the one sent last."""
        scene, settings = self._timeline.at(chunk), self._settings
        bias = settings.bias if scene.bias is None else scene.bias
        control = Control(settings.steps if scene.steps is None else scene.steps, bias, scene.seed)
        if control == self._control:
            return None
        self._control = control
        return control

    def _show(self, result: ChunkResult, latents: Flag) -> _Shown:
        chunk = result.chunk
        first = pixel_frames(CHUNK_LATENTS * chunk)
        # decode-all, the policy to compare with, delivers before it submits: no lane of its own
        with self._lanes.main() if self._settings.policy is AnchorPolicy.DECODE_ALL else self._lanes.side():
            self._pixels.decode_rest()
            self._pixels.encode_ready()
            pixels = self._pixels.pop(chunk)
            if self._settings.frames is not None:
                pixels = pixels[:, :, : self._settings.frames - first]
            with self._recorder.span(STAGE, "convert", chunk):
                converted = self._convert(pixels)
                finite = Flag(all_finite(pixels))
        return _Shown(Frames(converted, chunk, first, pixels.shape[2]), latents, finite)


@dataclass(frozen=True)
class _Shown:
    """Frames on their way out, and whether their latents and pixels are finite."""

    frames: Frames
    latents: Flag
    pixels: Flag

    @property
    def known(self) -> bool:
        """Whether `checked` would not wait for a device."""
        return self.latents.ready and self.pixels.ready

    def checked(self, check: Callable[[], None]) -> Frames:
        """The frames; waits for the latents' flag only, looks at the pixels' if it is there.

        `check` is called while waiting.
        """
        if not self.latents.wait(check):
            raise self._error("the transformer's latents")
        if self.pixels.ready and not self.pixels.wait(check):
            raise self._error("the VAE's pixels")
        self._hand_over()
        return self.frames

    def _hand_over(self) -> None:
        """Frames that stay on the device were made on a stream of the pipeline's own; the caller's comes after it."""
        import torch

        if isinstance(self.frames.pixels, torch.Tensor):
            self.pixels.lead(self.frames.pixels)

    def _error(self, where: str) -> RunError:
        return RunError(f"chunk {self.frames.chunk}: NaN or Inf in {where}; check weights and precision")
