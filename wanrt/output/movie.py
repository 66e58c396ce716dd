"""Video files: MP4, MOV, MKV, WebM, written so that nothing but the current chunk can be lost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import OutputError, UsageError

from .encoder import EncoderSettings, VideoEncoder
from .errors import output_errors
from .fragments import FragmentFile, make_fragment
from .frames import to_block
from .publish import keep_partial, publish
from .sink import PixelFormat, Sink
from .target import Target

if TYPE_CHECKING:
    from av import Packet

    from .sink import Pixels

log = logging.getLogger("wanrt.output")


class MovieSink(Sink):
    """Encodes with PyAV into a hidden fragmented MP4 beside the target and remuxes it at the end.

    Whatever was written is on disk after `flush_chunk`, at the latest after a second of video.
    """

    pixel_format = PixelFormat.NV12

    def __init__(
        self, target: Target, settings: EncoderSettings, tags: Mapping[str, str], *, force: bool = False
    ) -> None:
        self.spec = settings.spec
        self.target, self.tags, self.force = target, dict(tags), force
        self._encoder = VideoEncoder(settings)
        self._packets: list[Packet] = []
        self._fragments = 0
        self._frames_per_second = max(1, round(self.spec.fps))
        with output_errors(target.path):
            self._file = FragmentFile(target.temporary("mp4"), self._encoder.header)

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        block = to_block(pixels, self.spec, self.pixel_format)
        with output_errors(self.target.path):
            for planes in block.numpy():
                self._packets += self._encoder.encode(planes)
        self.frames_written += len(block)
        if len(self._packets) >= self._frames_per_second:
            self.flush_chunk()

    def flush_chunk(self) -> None:
        """Append what was encoded to the file as one fragment."""
        if not self._packets:
            return
        with output_errors(self.target.path):
            fragment = make_fragment(self._packets, self._encoder.stream, self._fragments + 1)
            self._file.append(fragment)
        self._fragments += 1
        self._packets = []

    def finish(self) -> Path:
        """Remux into the final container (MP4 and MOV with their index in front) and rename."""
        try:
            self._close_encoder()
            if not self._fragments:
                raise OutputError(f"{self.target.path}: no frame was made, so no video was written")
            self._file.close()
            return publish(self.target, self._file.path, self.tags, self.spec.fps, force=self.force)
        except (OutputError, UsageError) as error:
            kept = self.abort()
            where = f"; what was written plays: {kept}" if kept else ""
            raise OutputError(f"{error}{where}") from error

    def abort(self) -> Path | None:
        """Keep what was written as STEM.partial.mp4."""
        try:
            self._close_encoder()
        except (OutputError, ValueError) as error:
            log.debug("closing the encoder after a failure: %s", error)
        self._file.close()
        return keep_partial(self.target, self._file.path, empty=not self._fragments)

    def _close_encoder(self) -> None:
        if self._encoder.closed:
            return
        with output_errors(self.target.path):
            self._packets += self._encoder.drain()
        self.flush_chunk()
