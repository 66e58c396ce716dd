"""Animated GIFs: 256 colours chosen anew for each frame, written as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.filter

from wanrt.errors import OutputError, UsageError

from .errors import output_errors
from .frames import to_block
from .publish import keep_partial, put_in_place
from .sink import Sink
from .spec import PixelFormat, VideoSpec
from .target import Target

if TYPE_CHECKING:
    from .frames import Pixels

log = logging.getLogger("wanrt.output")

BROWSER_LIMIT = 50  # a delay under 2/100 s is played as 10/100 by every browser
TRAILER = b"\x3b"
COMMENT = b"\x21\xfe"


class GifSink(Sink):
    """Writes a hidden `.part.gif` and renames it. GIF counts time in 1/100 s: delays alternate, their mean
    is exact."""

    pixel_format = PixelFormat.RGB

    def __init__(
        self, target: Target, spec: VideoSpec, tags: Mapping[str, str], *, force: bool = False
    ) -> None:
        self.target, self.spec, self.force = target, spec, force
        self._comment = tags.get("comment", "")
        self._closed = False
        if spec.fps > BROWSER_LIMIT:
            log.warning("%s: browsers play a GIF of more than %d fps at 10 fps", target.path, BROWSER_LIMIT)
        self.temporary = target.temporary("gif")
        with output_errors(target.path):
            self._container = av.open(str(self.temporary), "w", format="gif", options={"flush_packets": "1"})
            self._stream = self._container.add_stream("gif", rate=spec.fps)
            self._stream.width, self._stream.height, self._stream.pix_fmt = spec.width, spec.height, "pal8"
            self._stream.codec_context.time_base = spec.time_base
            self._graph = palette_graph(spec)

    def write(self, pixels: Pixels) -> None:
        """See `Sink.write`."""
        block = to_block(pixels, self.spec, self.pixel_format)
        with output_errors(self.target.path):
            for picture in block.numpy():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = self.frames_written, self.spec.time_base
                self._graph.push(frame)
                self._mux()
                self.frames_written += 1

    def _mux(self) -> None:
        for frame in pulled(self._graph):
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> Path:
        """Complete the file and give it its name."""
        try:
            self._close()
            if not self.frames_written:
                raise OutputError(f"{self.target.path}: no frame was made, so no video was written")
            with output_errors(self.target.path):
                add_comment(self.temporary, self._comment)
            put_in_place(self.temporary, self.target, force=self.force)
        except (OutputError, UsageError) as error:
            kept = self.abort()
            raise OutputError(f"{error}; what was written plays: {kept}" if kept else str(error)) from error
        return self.target.path

    def abort(self) -> Path | None:
        """Keep what was written as STEM.partial.gif."""
        try:
            self._close()
        except OutputError as error:
            log.debug("closing after a failure: %s", error)
        return keep_partial(self.target, self.temporary, empty=not self.frames_written)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with output_errors(self.target.path):
            try:
                if self.frames_written:
                    self._graph.push(None)
                    self._mux()
                    self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()


def palette_graph(spec: VideoSpec) -> av.filter.Graph:
    """RGB frames to paletted ones: a palette for each frame, ordered dither (it does not crawl as error
    diffusion)."""
    graph, rgb = av.filter.Graph(), av.VideoFormat("rgb24", spec.width, spec.height)
    source = graph.add_buffer(
        width=spec.width, height=spec.height, format=rgb, time_base=spec.time_base, name="in"
    )
    split, sink = graph.add("split"), graph.add("buffersink")
    generate = graph.add("palettegen", "stats_mode=single")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """The frames that a graph has ready."""
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        assert isinstance(frame, av.VideoFrame)
        yield frame


def add_comment(path: Path, text: str) -> None:
    """Put a comment extension (GIF89a, section 24) before the trailer of a complete GIF."""
    data = text.encode()
    parts = [data[at : at + 255] for at in range(0, len(data), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        if text and file.read(1) == TRAILER:
            file.seek(-1, 2)
            file.write(COMMENT + blocks + b"\0" + TRAILER)
