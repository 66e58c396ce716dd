"""PNG sequences: each frame a file of its own, under its name only when it is whole."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from wanrt.errors import OutputError

from .errors import output_errors
from .frames import to_block
from .sink import Sink
from .spec import PixelFormat, VideoSpec
from .target import Target

if TYPE_CHECKING:
    from .frames import Pixels

IHDR_END = 33  # signature 8, IHDR chunk 25 (PNG specification, section 11.2.1)


class PngSink(Sink):
    """Writes `frame_00001.png` and so on; tags are text chunks of every frame.

    With `force`, frames of an earlier, longer run are removed at the end.
    """

    pixel_format = PixelFormat.RGB

    def __init__(self, target: Target, spec: VideoSpec, tags: Mapping[str, str]) -> None:
        self.target, self.spec = target, spec
        self._text = b"".join(text_chunk(key, value) for key, value in tags.items())
        self._encoder = _png_encoder(spec)
        with output_errors(target.path.parent):
            target.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        for frame in to_block(pixels, self.spec, self.pixel_format).numpy():
            self._write_frame(frame)

    def _write_frame(self, frame: np.ndarray) -> None:
        path, temporary = self.target.frame_path(self.frames_written + 1), self.target.temporary("png")
        with output_errors(path):
            try:
                temporary.write_bytes(self._encode(frame))
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        self.frames_written += 1

    def _encode(self, frame: np.ndarray) -> bytes:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self.frames_written
        data = b"".join(bytes(packet) for packet in self._encoder.encode(picture))
        return data[:IHDR_END] + self._text + data[IHDR_END:]

    def finish(self) -> Path:
        """Remove older frames behind the last one; return the pattern of the names."""
        if not self.frames_written:
            raise OutputError(f"{self.target.path}: no frame was made, so no image was written")
        with output_errors(self.target.path):
            for number, path in self.target.frames_on_disk().items():
                if number > self.frames_written:
                    path.unlink()
        return self.target.path

    def abort(self) -> Path | None:
        """Every frame written is whole already."""
        return self.target.path if self.frames_written else None


def _png_encoder(spec: VideoSpec) -> av.VideoCodecContext:
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = spec.width, spec.height, "rgb24"
    encoder.time_base = Fraction(spec.time_base)
    return encoder


def text_chunk(key: str, value: str) -> bytes:
    """An uncompressed iTXt chunk (PNG specification, section 11.3.3.4)."""
    body = b"iTXt" + key.encode("latin-1") + b"\0\0\0\0\0" + value.encode()
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
