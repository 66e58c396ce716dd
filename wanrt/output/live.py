"""A live stream: frames in bursts to a constant rate, encoded once, delivered to any number of targets."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from wanrt.errors import OutputError

from .address import Address
from .delivery import Connection, Delivery, DeliveryPhase, DeliveryState, LivePacket
from .encoder import VideoEncoder, choose_live_encoder
from .feed import FeedTrack
from .flv import SilentAudio
from .frames import to_block
from .hls import HlsFolder, check_folder
from .pacing import Metronome, Pace, Pacer
from .sink import Sink
from .spec import PixelFormat, VideoSpec
from .transport import LiveTrack, connect

if TYPE_CHECKING:
    from .frames import FrameBlock, Pixels

log = logging.getLogger("wanrt.output")

BITS_PER_PIXEL = 0.12  # of H.264 at a low-motion live quality
LEAST_BITS = 250_000
ENDED = (DeliveryPhase.CLOSED, DeliveryPhase.FAILED)


def default_bits(spec: VideoSpec) -> int:
    """A constant bit rate for a size and rate, bits per second."""
    return max(LEAST_BITS, round(BITS_PER_PIXEL * spec.width * spec.height * spec.fps))


@dataclass(frozen=True)
class LiveState:
    """A live stream, for the panel.

    Attributes:
        ticks: frames shown.
        repeated: of them, those that only repeated the one before.
        late: of them, those shown later than a frame's time after they were due.
        stalls: how often the schedule was started anew.
        waiting: seconds of generated video not shown yet.
        blocked: seconds that generation has waited for the stream (it is faster than real time).
        generation_rate: frames per second that come in; 0 before it is known.
        targets: one state each.
    """

    ticks: int
    repeated: int
    late: int
    stalls: int
    waiting: float
    blocked: float
    generation_rate: float
    targets: tuple[DeliveryState, ...]


class LiveOutput(Protocol):
    """A live target that is more than an address: a `PageServer`."""

    @property
    def address(self) -> Address:
        """Its name."""

    def open(self, track: FeedTrack) -> Connection:
        """Show this stream from now on."""


class LiveSink(Sink):
    """Streams to RTMP, RTMPS, SRT and UDP addresses and HLS playlists at once.

    Frames are shown at exactly the stream's rate by a thread of its own. `write` waits while more than
    `latency` seconds of video are at hand, so generation is paced when it is faster; `pace` says what
    viewers see when it is slower. The network never holds up `write`: see `Delivery`.

    Args:
        targets: addresses; a string ending in .m3u8 is an HLS playlist; or a `PageServer`.
        spec: size and rate.
        pace: see `Pace`.
        latency: seconds of video that may wait, before the encoder and again before each target's network.
        bits: bits per second; None for `default_bits`.
        threads: encoder threads, 0 for one per core.
        clock: seconds, monotonic.

    Raises:
        UsageError: an address is wrong.
        OutputError: nothing here encodes H.264, or an HLS folder cannot be made.
    """

    pixel_format = PixelFormat.NV12

    def __init__(
        self,
        targets: Sequence[str | Address | LiveOutput],
        spec: VideoSpec,
        *,
        pace: Pace = Pace.REPEAT,
        latency: float = 2.0,
        bits: int | None = None,
        threads: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        places = [live_address(target) if isinstance(target, str) else target for target in targets]
        self._encoder, track = _open_encoder(spec, bits or default_bits(spec), threads)
        self._clock = clock
        self._capacity = max(1, round(latency * spec.fps))
        self._pacer = Pacer(pace, float(spec.fps))
        self._changed = threading.Condition()
        self._inbox: deque[tuple[FrameBlock, float]] = deque()
        self._keyframe = threading.Event()
        self._closing = self._dropping = False
        self._error: OutputError | None = None
        self._ticks = self._repeated = self._late = self._stalls = 0
        self._blocked = 0.0
        self._deliveries = [self._deliver_to(place, track, latency) for place in places]
        self._thread = threading.Thread(target=self._run, name="wanrt-live", daemon=True)
        self._thread.start()

    def _deliver_to(self, target: Address | LiveOutput, track: LiveTrack, latency: float) -> Delivery:
        address = target if isinstance(target, Address) else target.address

        def opened() -> Connection:
            if not isinstance(target, Address):
                return target.open(
                    FeedTrack(self._encoder.header, track.stream, self.spec, self._keyframe.set)
                )
            if address.scheme == "hls":
                return HlsFolder(Path(address.host), self._encoder.header, track.stream, self.spec)
            return connect(address, track)

        if address.scheme == "hls":
            check_folder(Path(address.host))
        return Delivery(
            address,
            opened,
            fps=float(self.spec.fps),
            latency=latency,
            want_keyframe=self._keyframe.set,
            clock=self._clock,
        )

    @property
    def state(self) -> LiveState:
        """Counts now."""
        with self._changed:
            return LiveState(
                ticks=self._ticks,
                repeated=self._repeated,
                late=self._late,
                stalls=self._stalls,
                waiting=float(self.spec.seconds(self._waiting)),
                blocked=self._blocked,
                generation_rate=self._pacer.generation_rate or 0.0,
                targets=tuple(delivery.state for delivery in self._deliveries),
            )

    @property
    def _waiting(self) -> int:
        return self._pacer.waiting + sum(len(block) for block, _ in self._inbox)

    def write(self, pixels: Pixels) -> None:
        """Take frames; waits while the stream has more than `latency` seconds at hand.

        Raises:
            OutputError: the encoder failed, or every target has failed for good.
            ValueError: for frames of another shape.
        """
        block = to_block(pixels, self.spec, self.pixel_format)
        started = self._clock()
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._closing or self._has_room(len(block)))
            self._blocked += self._clock() - started
            self._raise_failure()
            if self._closing:
                raise OutputError("live output: written to after it was closed")
            self._inbox.append((block, self._clock()))
            self.frames_written += len(block)
            self._changed.notify_all()

    def _has_room(self, frames: int) -> bool:
        return not self._waiting or self._waiting + frames <= self._capacity

    def _raise_failure(self) -> None:
        if self._error:
            raise OutputError(str(self._error))
        states = [delivery.state for delivery in self._deliveries]
        if states and all(state.phase is DeliveryPhase.FAILED for state in states):
            raise OutputError(states[0].error)

    def finish(self) -> Path:
        """Show what is at hand at its pace, end the streams; returns the first target's name as a path."""
        self._close()
        self._raise_failure()
        return Path(self._deliveries[0].address.host)

    def abort(self) -> Path | None:
        """End the streams without showing what is left."""
        self._dropping = True
        self._close()
        return None

    def end(self) -> None:
        """Show what is at hand and then nothing: the last frame is not repeated any more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _close(self) -> None:
        self.end()
        self._thread.join()
        for delivery in self._deliveries:
            delivery.end()
        for delivery in self._deliveries:
            delivery.close()
        if all(delivery.state.phase in ENDED for delivery in self._deliveries):
            self._encoder.close()

    # the thread

    def _run(self) -> None:
        try:
            self._show_all()
        except Exception as error:
            log.debug("live encoder failed", exc_info=error)
            with self._changed:
                self._error = OutputError(f"live encoder: {error}")
                self._changed.notify_all()

    def _show_all(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._closing)
        metronome = Metronome(float(self.spec.fps), self._clock())
        while self._wait_until(metronome):
            now = self._clock()
            self._late += now - metronome.due > 1 / metronome.fps
            metronome.tick(now)
            self._stalls = metronome.stalls
            self._show()

    def _wait_until(self, metronome: Metronome) -> bool:
        """Sleep until the next tick; False when the stream is over."""
        with self._changed:
            while (left := metronome.due - self._clock()) > 0 and not self._dropping:
                self._changed.wait(left)
            return not (self._closing and (self._dropping or not self._waiting))

    def _show(self) -> None:
        with self._changed:
            while self._inbox:
                block, came = self._inbox.popleft()
                self._pacer.put(list(block.numpy()), came)
            shown = self._pacer.take()
            self._changed.notify_all()
        if shown is None:
            return
        self._repeated += shown.repeated
        self._send(shown.planes)

    def _send(self, planes: np.ndarray) -> None:
        keyframe = self._keyframe.is_set()
        self._keyframe.clear()
        for packet in self._encoder.encode(planes, keyframe=keyframe):
            made = LivePacket(bytes(packet), packet.pts or 0, packet.is_keyframe)
            for delivery in self._deliveries:
                delivery.offer(made)
        self._ticks += 1


def live_address(target: str) -> Address:
    """A URL, or the path of an HLS playlist.

    Raises:
        UsageError: when it is neither.
    """
    if target.endswith(".m3u8") and "://" not in target:
        return Address("hls", target, 0)
    return Address.parse(target)


def _open_encoder(spec: VideoSpec, bits: int, threads: int) -> tuple[VideoEncoder, LiveTrack]:
    from dataclasses import replace

    settings = choose_live_encoder(spec, bits)
    if settings is None:
        raise OutputError("live output: no H.264 encoder in PyAV's FFmpeg; install PyAV from its wheel")
    encoder = VideoEncoder(replace(settings, threads=threads))
    return encoder, LiveTrack(encoder.stream, spec, bits, SilentAudio.encoded())
