"""Video files: MP4, MOV, MKV, WebM, written so that nothing but the current chunk can be lost."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import OutputError, UsageError

from .encoder import EncoderSettings, VideoEncoder
from .errors import output_errors
from .fragments import FragmentFile, make_fragment
from .frames import to_block
from .publish import keep_partial, publish
from .sink import Sink
from .spec import PixelFormat, VideoSpec
from .target import Target

if TYPE_CHECKING:
    from av import Packet

    from .frames import Pixels

log = logging.getLogger("wanrt.output")


class FragmentedSink(Sink):
    """What file sinks share: a fragmented MP4 under a hidden name, finished by a remux and a rename.

    Args:
        target: the file to make.
        spec: size and rate.
        tags: of the finished file.
        force: replace a file that has appeared meanwhile.
    """

    pixel_format = PixelFormat.NV12

    def __init__(self, target: Target, spec: VideoSpec, tags: Mapping[str, str], force: bool) -> None:
        self.target, self.spec, self.tags, self.force = target, spec, dict(tags), force
        self.temporary = target.temporary("mp4")

    @abstractmethod
    def _close(self) -> None:
        """Get the encoder's last packets into the temporary file and close it; harmless when closed."""

    @abstractmethod
    def _release(self) -> None:
        """After a failure: let go of the file and the encoder, raise nothing."""

    def finish(self) -> Path:
        """Remux into the final container (MP4 and MOV with their index in front) and rename."""
        try:
            self._close()
            if not self.frames_written:
                raise OutputError(f"{self.target.path}: no frame was made, so no video was written")
            return publish(self.target, self.temporary, self.tags, self.spec.fps, force=self.force)
        except (OutputError, UsageError) as error:
            kept = self.abort()
            raise OutputError(f"{error}; what was written plays: {kept}" if kept else str(error)) from error

    def abort(self) -> Path | None:
        """Keep what was written as STEM.partial.mp4."""
        try:
            self._close()
        except OutputError as error:
            log.debug("closing after a failure: %s", error)
        self._release()
        return keep_partial(self.target, self.temporary, empty=not self.frames_written)


class MovieSink(FragmentedSink):
    """Encodes with PyAV.

    Whatever was written is in the file after `flush_chunk`, at the latest after a second of video.
    """

    def __init__(
        self, target: Target, settings: EncoderSettings, tags: Mapping[str, str], *, force: bool = False
    ) -> None:
        super().__init__(target, settings.spec, tags, force)
        self._encoder = VideoEncoder(settings)
        self._packets: list[Packet] = []
        self._fragments = 0
        self._flush_every = max(1, round(self.spec.fps))
        with output_errors(target.path):
            self._file = FragmentFile(self.temporary, self._encoder.header)

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        block = to_block(pixels, self.spec, self.pixel_format)
        with output_errors(self.target.path):
            for planes in block.numpy():
                self._packets += self._encoder.encode(planes)
        self.frames_written += len(block)
        if len(self._packets) >= self._flush_every:
            self.flush_chunk()

    def flush_chunk(self) -> None:
        """Append what was encoded to the file as one fragment."""
        if not self._packets:
            return
        with output_errors(self.target.path):
            fragment = make_fragment(self._packets, self._encoder.stream, self._fragments + 1)
            self._packets = []
            self._file.append(fragment)
        self._fragments += 1

    def _close(self) -> None:
        if not self._encoder.drained:
            with output_errors(self.target.path):
                self._packets += self._encoder.drain()
        self.flush_chunk()
        self._encoder.close()
        self._file.close()

    def _release(self) -> None:
        self._packets = []
        self._encoder.close()
        self._file.close()
        if not self._fragments:
            self.frames_written = 0
