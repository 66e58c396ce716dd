"""The stream as fragmented MP4 for any number of readers that come and go: what a browser's MediaSource
plays."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import flv
from .delivery import LivePacket
from .fragments import make_fragment
from .hls import av_packet
from .spec import VideoSpec

if TYPE_CHECKING:
    from av.video.stream import VideoStream

QUEUE_SECONDS = 4  # that a slow reader may lag before it is sent on to the next keyframe
WAIT_SECONDS = 1.0  # between looks at whether a reader is still wanted


@dataclass(frozen=True)
class FeedTrack:
    """What a reader begins with.

    Attributes:
        header: ftyp and moov.
        stream: of the open encoder.
        spec: size and rate.
        want_keyframe: asks for one, so that a new reader need not wait.
    """

    header: bytes
    stream: VideoStream
    spec: VideoSpec
    want_keyframe: Callable[[], None]

    @property
    def codec(self) -> str:
        """MIME type with the codec's profile and level (RFC 6381), from the parameter sets."""
        extradata = bytes(self.stream.codec_context.extradata or b"")
        sps = next(unit for unit in flv.nal_units(extradata) if flv.nal_type(unit) == flv.SPS)
        return f'video/mp4; codecs="avc1.{sps[1:4].hex()}"'


class Reader:
    """One reader's queue of fragments; begins with a keyframe, and again after it was too slow."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._fragments: deque[bytes] = deque()
        self._needs_keyframe, self._ended = True, False

    def offer(self, fragment: bytes, keyframe: bool) -> bool:
        """Queue a fragment, unless a keyframe has to come first; False when that begins with this one."""
        with self._changed:
            if self._needs_keyframe and not keyframe:
                return True
            self._needs_keyframe = False
            self._fragments.append(fragment)
            if len(self._fragments) > self._limit:
                self._fragments.clear()
                self._needs_keyframe = True
            self._changed.notify_all()
            return not self._needs_keyframe

    def end(self) -> None:
        """No more fragments will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """Fragments as they come; b"" when none came for a while, so that the caller can look around."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fragments or self._ended, WAIT_SECONDS)
                waiting = b"".join(self._fragments)
                self._fragments.clear()
                if not waiting and self._ended:
                    return
            yield waiting


class FragmentFeed:
    """A live connection (see `Connection`) that hands its frames, a fragment each, to readers."""

    def __init__(self, track: FeedTrack) -> None:
        self.track = track
        self._lock = threading.Lock()
        self._readers: list[Reader] = []
        self._count = 0
        self._ended = False

    def read(self) -> Reader:
        """A new reader; its first fragment is a keyframe, which is asked for."""
        reader = Reader(max(1, round(QUEUE_SECONDS * self.track.spec.fps)))
        with self._lock:
            if self._ended:
                reader.end()
            self._readers.append(reader)
        self.track.want_keyframe()
        return reader

    def leave(self, reader: Reader) -> None:
        """The reader has gone."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)

    @property
    def readers(self) -> int:
        """How many there are."""
        with self._lock:
            return len(self._readers)

    def deliver(self, packet: LivePacket) -> None:
        """One frame to all readers."""
        with self._lock:
            readers = list(self._readers)
        self._count += 1
        if not readers:
            return
        fragment = make_fragment([av_packet(packet, self.track.spec)], self.track.stream, self._count)
        kept_up = [reader.offer(fragment, packet.keyframe) for reader in readers]
        if not all(kept_up):
            self.track.want_keyframe()

    def idle(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """End all readers."""
        with self._lock:
            self._ended = True
            for reader in self._readers:
                reader.end()

    def shut(self) -> None:
        """End all readers."""
        self.close()
