"""The encoder as a stage of its own in the recording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.output import Sink
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    from wanrt.output.frames import Pixels

STAGE = "encoder"


class RecordedSink(Sink):
    """A sink whose work is recorded: "encode" for frames, "mux" for chunk boundaries, "finish" for the end.

    Frames count as delivered when they are here, on the host. One `write` and one `flush_chunk` a chunk.
    """

    def __init__(self, sink: Sink, recorder: Recorder) -> None:
        self.spec, self.pixel_format = sink.spec, sink.pixel_format
        self._sink, self._recorder = sink, recorder
        self._chunk = 0

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        ready = getattr(pixels, "ready", None)
        if ready is not None:
            ready.synchronize()
        self._recorder.frames(self._chunk, len(pixels))
        with self._recorder.span(STAGE, "encode", self._chunk, host=True):
            self._sink.write(pixels)
        self.frames_written = self._sink.frames_written

    def flush_chunk(self) -> None:
        """See `Sink.flush_chunk`."""
        with self._recorder.span(STAGE, "mux", self._chunk, host=True):
            self._sink.flush_chunk()
        self._chunk += 1

    def finish(self) -> Path:
        """See `Sink.finish`."""
        with self._recorder.span(STAGE, "finish", host=True):
            return self._sink.finish()

    def abort(self) -> Path | None:
        """See `Sink.abort`."""
        return self._sink.abort()
