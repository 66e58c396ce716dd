"""From a live address to an open connection: RTMP on a socket, MPEG-TS over UDP, SRT through ffmpeg."""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import av

from wanrt import __version__
from wanrt.errors import OutputError

from . import flv
from .address import Address
from .delivery import Connection, LivePacket
from .pipe import bundled_ffmpeg
from .rtmp import RtmpConnection
from .spec import VideoSpec

if TYPE_CHECKING:
    from av.video.stream import VideoStream

log = logging.getLogger("wanrt.output")

DATAGRAM = 7 * 188  # MPEG-TS packets that fit an Ethernet frame
STALL_SECONDS = 10.0
UNSENT_SECONDS = 0.25  # of video that may wait in the system below the queue, which drops what is too old
LEAST_UNSENT = 16_384  # bytes; less than a packet or two would starve a good connection


@dataclass(frozen=True)
class LiveTrack:
    """What every connection of a stream begins with.

    Attributes:
        stream: of the open encoder.
        spec: size and rate.
        video_bits: per second.
        audio: the silent track.
    """

    stream: VideoStream
    spec: VideoSpec
    video_bits: int
    audio: flv.SilentAudio


def connect(address: Address, track: LiveTrack) -> Connection:
    """Open a target.

    Raises:
        OutputError: when it cannot be opened; names the host alone.
    """
    if address.scheme in ("rtmp", "rtmps"):
        return RtmpDelivery(address, track)
    writer = _udp_writer(address) if address.scheme == "udp" else SrtProcess(address)
    return TransportStream(track, writer)


class SilentTrack:
    """Counts out the audio frames that go with a video: up to the end of the video frame being sent."""

    def __init__(self, spec: VideoSpec) -> None:
        self._ratio = Fraction(flv.AUDIO_RATE, flv.AUDIO_FRAME) / spec.fps
        self._next = 0

    def until(self, number: int) -> range:
        """Audio frames that begin before video frame `number` + 1 and were not counted out before."""
        stop = -(-(number + 1) * self._ratio // 1)
        due = range(self._next, max(self._next, int(stop)))
        self._next = due.stop
        return due


class RtmpDelivery:
    """FLV tags over RTMP."""

    def __init__(self, address: Address, track: LiveTrack) -> None:
        unsent = max(LEAST_UNSENT, round(UNSENT_SECONDS * track.video_bits / 8))
        self._connection = RtmpConnection(address, stall_seconds=STALL_SECONDS, unsent_bytes=unsent)
        self._track, self._audio, self._first = track, SilentTrack(track.spec), -1
        try:
            for tag in header_tags(track):
                self._connection.send(tag)
        except OutputError as error:  # how many servers refuse: they begin, then hang up
            self._connection.shut()
            raise OutputError(f"{error}; check host, application and stream key") from None

    def deliver(self, packet: LivePacket) -> None:
        """The silence up to the frame, then the frame."""
        if self._first < 0:
            self._first = packet.number
        number = packet.number - self._first
        stamp = flv.milliseconds(number, self._track.spec.fps)
        body = flv.video_body(packet.data, packet.keyframe)
        tags = [self._track.audio.tag(index) for index in self._audio.until(number)]
        for tag in sorted([flv.Tag(flv.VIDEO, stamp, body), *tags], key=lambda tag: tag.milliseconds):
            self._connection.send(tag)

    def idle(self) -> None:
        """Answer pings."""
        self._connection.listen()

    def close(self) -> None:
        """End the stream."""
        self._connection.close()

    def shut(self) -> None:
        """Close at once."""
        self._connection.shut()


def header_tags(track: LiveTrack) -> list[flv.Tag]:
    """Metadata and the two sequence headers."""
    extradata = bytes(track.stream.codec_context.extradata or b"")
    return [
        flv.metadata_tag(track.spec, track.video_bits, __version__),
        flv.Tag(flv.VIDEO, 0, flv.video_header(extradata)),
        track.audio.header_tag(),
    ]


class Writer:
    """Where the bytes of a transport stream go: an unseekable file that PyAV can write to."""

    def __init__(self, send: Callable[[bytes], None], close: Callable[[], None]) -> None:
        self._send, self._close = send, close
        self.closed = False  # PyAV asks, before it ends a stream that nobody closed

    def close(self) -> None:
        """Let go of the socket or process; harmless when closed."""
        if not self.closed:
            self.closed = True
            self._close()

    def write(self, data: bytes) -> int:
        """Send all of it; raises OutputError."""
        self._send(bytes(data))
        return len(data)


def _udp_writer(address: Address) -> Writer:
    try:
        family, kind, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)[0]
        sender = socket.socket(family, kind)
        sender.connect(place)
    except OSError as error:
        raise OutputError(f"{address}: {error.strerror or error}") from None

    def send(data: bytes) -> None:
        for at in range(0, len(data), DATAGRAM):
            try:
                sender.send(data[at : at + DATAGRAM])
            except ConnectionRefusedError:
                pass  # nobody listens at present; UDP does not mind
            except OSError as error:
                raise OutputError(f"{address}: {error.strerror or error}") from None

    return Writer(send, sender.close)


class SrtProcess(Writer):
    """MPEG-TS through a pipe into the bundled ffmpeg, which speaks SRT (PyAV's build does not)."""

    def __init__(self, address: Address) -> None:
        self._address = address
        # as raw data: read as MPEG-TS, ffmpeg would look at seconds of it before it sends anything
        command = [str(bundled_ffmpeg()), "-hide_banner", "-loglevel", "error"]
        command += ["-f", "data", "-raw_packet_size", str(DATAGRAM), "-i", "pipe:0"]
        command += ["-map", "0", "-c", "copy", "-flush_packets", "1", "-f", "data", address.url]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)
        super().__init__(self._feed, self._end)

    def _feed(self, data: bytes) -> None:
        assert self._process.stdin
        pipe, view, deadline = (
            self._process.stdin.fileno(),
            memoryview(data),
            time.monotonic() + STALL_SECONDS,
        )
        while view:
            if self._process.poll() is not None:
                raise OutputError(f"{self._address}: {self._last_words()}")
            if not select.select([], [pipe], [], 0.5)[1]:
                if time.monotonic() > deadline:
                    raise OutputError(f"{self._address}: accepted nothing for {STALL_SECONDS:g} s")
                continue
            try:
                view = view[os.write(pipe, view) :]
            except OSError:
                self._process.wait(STALL_SECONDS)

    def _last_words(self) -> str:
        assert self._process.stderr
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return (
            self._address.redact(lines[-1]) if lines else f"ffmpeg ended with code {self._process.returncode}"
        )

    def _end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class TransportStream:
    """H.264 and the silent track as MPEG-TS, parameter sets before each keyframe."""

    def __init__(self, track: LiveTrack, writer: Writer) -> None:
        self._track, self._writer, self._first = track, writer, -1
        self._audio = SilentTrack(track.spec)
        self._sound_bytes = flv.adts(track.audio.frame)
        self._container = av.open(writer, "w", format="mpegts", options={"flush_packets": "1"})
        self._video = self._container.add_stream_from_template(track.stream)
        self._sound = self._container.add_mux_stream("aac", rate=flv.AUDIO_RATE)

    def deliver(self, packet: LivePacket) -> None:
        """The silence up to the end of the frame and the frame."""
        if self._first < 0:
            self._first = packet.number
        number = packet.number - self._first
        for index in self._audio.until(number):
            sound = self._packet(self._sound_bytes, index, Fraction(flv.AUDIO_FRAME, flv.AUDIO_RATE))
            sound.stream = self._sound
            self._container.mux(sound)
        picture = self._packet(packet.data, number, self._track.spec.time_base)
        picture.is_keyframe, picture.stream = packet.keyframe, self._video
        self._container.mux(picture)

    def idle(self) -> None:
        """Nothing is said in this direction."""

    def _packet(self, data: bytes, number: int, time_base: Fraction) -> av.Packet:
        packet = av.Packet(data)
        packet.pts = packet.dts = number
        packet.duration, packet.time_base = 1, time_base
        return packet

    def close(self) -> None:
        """End the stream."""
        self._container.close()
        self._writer.close()

    def shut(self) -> None:
        """Close at once."""
        self._writer.close()
