"""An HLS folder: fragmented-MP4 segments and a playlist that browsers and players follow live (RFC 8216)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av

from wanrt.errors import OutputError

from .delivery import LivePacket
from .errors import output_errors
from .fragments import make_fragment
from .spec import VideoSpec

if TYPE_CHECKING:
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class Segment:
    """One finished segment.

    Attributes:
        name: file name.
        seconds: duration.
        gap: frames are missing before it.
    """

    name: str
    seconds: float
    gap: bool


class HlsFolder:
    """Writes `init.mp4`, `segment-N.m4s` and the playlist; each file appears whole, by a rename.

    Args:
        playlist: path of the `.m3u8`; its directory must exist.
        header: ftyp and moov of the encoder's stream.
        stream: of the open encoder.
        spec: size and rate.
        keep: segments in the playlist; two more stay on disk for players that lag.

    Raises:
        OutputError: when the folder cannot be written.
    """

    def __init__(
        self, playlist: Path, header: bytes, stream: VideoStream, spec: VideoSpec, keep: int = 6
    ) -> None:
        self._playlist, self._stream, self._spec, self._keep = playlist, stream, spec, keep
        self._prefix = playlist.stem
        self._packets: list[LivePacket] = []
        self._segments: deque[Segment] = deque()
        self._count = 0
        self._expected = -1
        self._gap = False
        self._put(f"{self._prefix}-init.mp4", header)

    def deliver(self, packet: LivePacket) -> None:
        """Add a frame; a keyframe begins a new segment."""
        if packet.keyframe and self._packets:
            self._end_segment()
        if not self._packets:
            self._gap = 0 <= self._expected != packet.number
        self._packets.append(packet)
        self._expected = packet.number + 1

    def close(self) -> None:
        """Write the last segment and mark the playlist as ended."""
        if self._packets:
            self._end_segment()
        self._write_playlist(ended=True)

    def idle(self) -> None:
        """Nothing to do."""

    def shut(self) -> None:
        """Nothing is open between calls."""

    def _end_segment(self) -> None:
        self._count += 1
        name = f"{self._prefix}-{self._count:06d}.m4s"
        packets = [av_packet(packet, self._spec) for packet in self._packets]
        self._put(name, make_fragment(packets, self._stream, self._count))
        self._segments.append(Segment(name, float(self._spec.seconds(len(packets))), self._gap))
        self._packets = []
        self._write_playlist()
        while len(self._segments) > self._keep + 2:
            (self._playlist.parent / self._segments.popleft().name).unlink(missing_ok=True)

    def _write_playlist(self, ended: bool = False) -> None:
        shown = list(self._segments)[-self._keep :]
        longest = max((segment.seconds for segment in shown), default=1.0)
        lines = ["#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{round(longest + 0.5)}"]
        lines += [f"#EXT-X-MEDIA-SEQUENCE:{self._count - len(shown) + 1}", "#EXT-X-INDEPENDENT-SEGMENTS"]
        lines += [f'#EXT-X-MAP:URI="{self._prefix}-init.mp4"']
        for segment in shown:
            lines += ["#EXT-X-DISCONTINUITY"] * segment.gap
            lines += [f"#EXTINF:{segment.seconds:.6f},", segment.name]
        lines += ["#EXT-X-ENDLIST"] * ended
        self._put(self._playlist.name, ("\n".join(lines) + "\n").encode())

    def _put(self, name: str, data: bytes) -> None:
        path = self._playlist.parent / name
        with output_errors(path):
            fresh = path.with_name(f".{name}.part")
            fresh.write_bytes(data)
            fresh.replace(path)


def av_packet(packet: LivePacket, spec: VideoSpec) -> av.Packet:
    """A frame with its time on the stream, for the muxer."""
    made = av.Packet(packet.data)
    made.pts = made.dts = packet.number
    made.duration, made.time_base, made.is_keyframe = 1, spec.time_base, packet.keyframe
    return made


def check_folder(playlist: Path) -> None:
    """Make the playlist's directory.

    Raises:
        OutputError: when it cannot be made.
    """
    try:
        playlist.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{playlist.parent}: cannot be made ({error.strerror})") from error
