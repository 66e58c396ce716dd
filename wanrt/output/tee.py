"""Several outputs of one video, none of which can harm another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import OutputError

from .sink import Sink
from .spec import PixelFormat

if TYPE_CHECKING:
    from .frames import Pixels

log = logging.getLogger("wanrt.output")


class TeeSink(Sink):
    """Gives every frame to every sink.

    A sink that fails is aborted and left out, with a log line; the others go on. Only when none is left does
    `write` raise. Put slow sinks into a `QueuedSink` each: they are written to one after the other.

    Args:
        sinks: at least one; all of the same size and rate.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        if not sinks:
            raise OutputError("output: no target given; name a file with -o")
        self.spec = sinks[0].spec
        formats = {sink.pixel_format for sink in sinks}
        self.pixel_format = PixelFormat.NV12 if formats == {PixelFormat.NV12} else PixelFormat.RGB
        self.sinks = list(sinks)
        self.failures: list[str] = []

    def write(self, pixels: Pixels) -> None:
        """Convert once for each format that is wanted, then hand on."""
        from .frames import FrameBlock, to_block

        blocks: dict[PixelFormat, Pixels] = {}
        for wanted in {sink.pixel_format for sink in self.sinks}:
            if isinstance(pixels, FrameBlock) and pixels.pixel_format is PixelFormat.RGB is not wanted:
                pixels = pixels.numpy()
            blocks[wanted] = pixels if isinstance(pixels, FrameBlock) else to_block(pixels, self.spec, wanted)
        self._each(lambda sink: sink.write(blocks[sink.pixel_format]))
        self.frames_written += len(pixels)

    def flush_chunk(self) -> None:
        """A chunk boundary for all."""
        self._each(lambda sink: sink.flush_chunk())

    def finish(self) -> Path:
        """Finish all; returns the first path. Raises OutputError naming those that failed, after finishing
        the rest."""
        paths: list[Path] = []
        for sink in self.sinks:
            sink.end()
        if self.sinks:
            self._each(lambda sink: paths.append(sink.finish()))
        if self.failures:
            raise OutputError("; ".join(self.failures))
        return paths[0]

    def abort(self) -> Path | None:
        """Abort all; returns the first path kept."""
        kept = [sink.abort() for sink in self.sinks]
        return next((path for path in kept if path), None)

    def _each(self, action: Callable[[Sink], object]) -> None:
        for sink in list(self.sinks):
            try:
                action(sink)
            except OutputError as error:
                self._leave_out(sink, error)
        if not self.sinks:
            raise OutputError("; ".join(self.failures))

    def _leave_out(self, sink: Sink, error: OutputError) -> None:
        log.error("%s; the other outputs go on", error) if len(self.sinks) > 1 else None
        self.sinks.remove(sink)
        self.failures.append(str(error))
        try:
            sink.abort()
        except OutputError as second:
            log.debug("closing after a failure: %s", second)
