"""A fragmented MP4 that grows chunk by chunk and plays at any moment.

PyAV's muxer keeps the newest packet of a fragment until the next one arrives, so a file written through it
is always a frame behind. Here each fragment is muxed alone into memory and its `moof` and `mdat` boxes are
appended with one write (ISO/IEC 14496-12, section 8.8): what was flushed is whole on disk.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av

if TYPE_CHECKING:
    from av import Packet
    from av.video.stream import VideoStream

# frag_discont: start at the packets' own time; the fragment knows nothing of the ones before
FRAGMENT_OPTIONS = {
    "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
    "use_editlist": "0",
}


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Top-level boxes of an MP4: (type, whole box)."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        yield data[at + 4 : at + 8], data[at : at + size]
        at += max(size, 8)


def make_fragment(packets: Sequence[Packet], stream: VideoStream, sequence: int) -> bytes:
    """`moof` and `mdat` of some packets of an open encoder's stream; `sequence` counts fragments from 1."""
    buffer = io.BytesIO()
    options = FRAGMENT_OPTIONS | {"fragment_index": str(sequence)}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        copy = container.add_stream_from_template(stream)
        copy.time_base = stream.time_base
        for packet in packets:
            packet.stream = copy
            container.mux(packet)
    return b"".join(box for kind, box in boxes(buffer.getvalue()) if kind in (b"moof", b"mdat"))


class FragmentFile:
    """An append-only file whose end is always the end of a fragment, also after a failed write.

    Raises:
        OSError: from opening or writing.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self.size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self.append(header)
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    def append(self, data: bytes) -> None:
        """Write whole or not at all: a write that fails half-way is cut off again."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, self.size)
            os.lseek(self._fd, 0, os.SEEK_END)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Close; harmless when closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
