"""Stage 0's VAE half: latents to pixels one by one with the state carried, pixels to anchors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wanrt.errors import RunError
from wanrt.pipeline.codec import Codec
from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.envelope import ChunkResult
from wanrt.pipeline.lanes import Lanes, OneLane
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    import torch

STAGE = "stage0"


class PixelStage:
    """Decodes each latent of one stream exactly once, in order, and encodes the anchors that later contexts
    want.

    `window` None: no chunk ever wants an anchor; `chunks`: how many there will be, None for ever; `lanes`: whose
    memory is shared between the two lanes' calls. An anchor
    is encoded as soon as it is asked for, or at the end of the decode that made its frame available: with a
    window above three latents it is ready before its chunk's turn, and no VAE work is left between two
    chunks.
    """

    def __init__(
        self,
        codec: Codec,
        window: int | None,
        recorder: Recorder,
        check: Callable[[], None] = lambda: None,
        chunks: int | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._codec, self._window, self._recorder, self._check = codec, window, recorder, check
        self._chunks, self._lanes = chunks, lanes or OneLane()
        self._waiting: list[tuple[int, int, torch.Tensor]] = []  # (chunk, latent index, latent)
        self._decoded: dict[int, list[torch.Tensor]] = {}  # pixels of each chunk so far
        self._kept: set[int] = set()  # latents whose last pixel frames are still to be encoded
        self._anchors: dict[int, torch.Tensor] = {}

    def take(self, result: ChunkResult, wanted: int | None = None) -> None:
        """Queues a chunk's latents; with `wanted`, only latents below that absolute index are ever decoded."""
        first = CHUNK_LATENTS * result.chunk
        self._decoded[result.chunk] = []
        for i in range(CHUNK_LATENTS):
            if wanted is None or first + i < wanted:
                latent = self._lanes.share(result.latents)[:, :, i : i + 1]
                self._waiting.append((result.chunk, first + i, latent))

    def anchor(self, latent: int) -> torch.Tensor:
        """The anchor that replaces `latent`, float32 `[B, 16, 1, h, w]`; decodes up to it if need be.

        Raises `RunError` for a latent that is not an anchor, was asked for before, or has not arrived.
        """
        self._lanes.join()
        self._decode(lambda index: index <= latent, "anchor-decode")
        if latent in self._kept:
            self._encode(latent)
        if latent not in self._anchors:
            raise RunError(
                f"stage 0: no anchor for latent {latent}: window {self._window}, have {sorted(self._anchors)}"
            )
        return self._anchors.pop(latent)

    def decode_rest(self) -> None:
        """Decodes every queued latent, in the lane that the caller is in."""
        self._decode(lambda _: True, "display-decode")

    def encode_ready(self) -> None:
        """Encodes the anchors whose frames are there, ahead of their chunk's turn."""
        for latent in sorted(self._kept):
            self._encode(latent)

    def pop(self, chunk: int) -> torch.Tensor:
        """All pixels of a finished chunk, `[B, 3, T, H, W]` in -1..1, T = 9 for chunk 0 and 12 for others."""
        import torch

        with torch.inference_mode():
            return torch.cat(self._decoded.pop(chunk), dim=2)

    def _decode(self, wanted: Callable[[int], bool], name: str) -> None:
        import torch

        while self._waiting and wanted(self._waiting[0][1]):
            chunk, index, latent = self._waiting.pop(0)
            self._check()
            with torch.inference_mode(), self._recorder.span(STAGE, name, chunk, latent=index):
                keep = self._is_anchor(index)
                pixels = self._codec.decode(latent, index, keep=keep)
                self._decoded[chunk].append(self._lanes.share(pixels))
            if keep:
                self._kept.add(index)

    def _encode(self, latent: int) -> None:
        import torch

        made = self._context_of(latent)[0] - 1  # the chunk whose end the anchor belongs to
        with torch.inference_mode(), self._recorder.span(STAGE, "anchor-encode", made, latent=latent):
            self._anchors[latent] = self._lanes.share(self._codec.encode(latent))
        self._kept.remove(latent)

    def _context_of(self, latent: int) -> tuple[int, int]:
        """The chunk whose context has an anchor in this latent's place, and 0 if it is one: 3k - window."""
        assert self._window is not None
        return divmod(latent + self._window, CHUNK_LATENTS)

    def _is_anchor(self, latent: int) -> bool:
        """Whether some context puts an anchor in this latent's place."""
        if self._window is None:
            return False
        chunk, rest = self._context_of(latent)
        exists = self._chunks is None or chunk < self._chunks
        return exists and rest == 0 and CHUNK_LATENTS * (chunk - 1) >= self._window
