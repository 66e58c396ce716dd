"""One target of a live stream on a thread of its own: connect, deliver, drop what is too old, connect
again."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from wanrt.errors import OutputError

from .address import Address
from .rtmp import RefusedError

log = logging.getLogger("wanrt.output")

BACKOFF = (1.0, 30.0)  # seconds, shortest and longest wait before the next attempt
IDLE_SECONDS = 0.5  # between looks at a connection that has nothing to send
CLOSE_SECONDS = 5.0  # for what is queued when the stream ends


@dataclass(frozen=True)
class LivePacket:
    """An encoded frame.

    Attributes:
        data: H.264, Annex B.
        number: tick of the stream, counted at its constant rate.
        keyframe: decoding can begin here.
    """

    data: bytes
    number: int
    keyframe: bool


class Connection(Protocol):
    """An open target. Numbers of packets are counted from the first packet it is given."""

    def deliver(self, packet: LivePacket) -> None:
        """Send a frame; raises OutputError when it cannot."""

    def idle(self) -> None:
        """Nothing to send for a while: answer the server, notice that it has gone; raises OutputError then."""

    def close(self) -> None:
        """End the stream and close."""

    def shut(self) -> None:
        """Close at once, from any thread."""


class DeliveryPhase(StrEnum):
    """What a target is doing."""

    CONNECTING = "connecting"
    LIVE = "live"
    WAITING = "waiting"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True)
class DeliveryState:
    """A target, for the panel.

    Attributes:
        name: scheme and host.
        phase: what it is doing.
        sent: frames delivered.
        dropped: frames that were never sent: too old, or no connection.
        connections: how often a connection was made.
        queued: seconds of video waiting for the network.
        error: the last failure; "" when there was none.
    """

    name: str
    phase: DeliveryPhase
    sent: int
    dropped: int
    connections: int
    queued: float
    error: str


class Delivery:
    """Feeds one target. `offer` never blocks.

    Newest frames win: when more than `latency` seconds wait for the network, all of them are dropped, and
    delivery goes on with the next keyframe, which is asked for. A broken connection is made again, after a
    third of the time that it has been gone, between 1 and 30 seconds. A target that refuses the very first
    attempt has failed for good.

    Args:
        address: the target.
        connect: opens a connection, or raises OutputError.
        fps: rate of packets.
        latency: seconds that may wait.
        want_keyframe: called when the next frame should be a keyframe.
        clock: seconds, monotonic.
        backoff: shortest and longest wait.
    """

    def __init__(
        self,
        address: Address,
        connect: Callable[[], Connection],
        *,
        fps: float,
        latency: float,
        want_keyframe: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        backoff: tuple[float, float] = BACKOFF,
    ) -> None:
        self.address = address
        self._connect, self._want_keyframe, self._clock, self._backoff = (
            connect,
            want_keyframe,
            clock,
            backoff,
        )
        self._fps, self._limit = fps, max(1, round(latency * fps))
        self._changed = threading.Condition()
        self._packets: deque[LivePacket] = deque()
        self._needs_keyframe = True
        self._phase = DeliveryPhase.CONNECTING
        self._connection: Connection | None = None
        self._sent = self._dropped = self._connections = 0
        self._error = ""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"wanrt-{address.scheme}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> DeliveryState:
        """Counts and phase now."""
        with self._changed:
            return DeliveryState(
                name=str(self.address),
                phase=self._phase,
                sent=self._sent,
                dropped=self._dropped,
                connections=self._connections,
                queued=len(self._packets) / self._fps,
                error=self._error,
            )

    def offer(self, packet: LivePacket) -> None:
        """Take a packet, or drop it when there is nobody to send it to."""
        with self._changed:
            if self._phase is not DeliveryPhase.LIVE or (self._needs_keyframe and not packet.keyframe):
                self._dropped += 1
                return
            self._needs_keyframe = False
            self._packets.append(packet)
            if len(self._packets) > self._limit:
                self._drop_all()
            self._changed.notify_all()

    def end(self) -> None:
        """Take nothing more; returns at once. `close` waits for the end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is queued if that is soon done, and close."""
        self.end()
        self._thread.join(seconds)
        connection = self._connection
        if self._thread.is_alive() and connection:
            connection.shut()
            self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("%s: does not close; left behind", self.address)

    def _drop_all(self) -> None:
        self._dropped += len(self._packets)
        self._packets.clear()
        self._needs_keyframe = True
        self._want_keyframe()

    # the thread

    def _run(self) -> None:
        gone_since = self._clock()
        while not self._closing:
            try:
                self._session()
            except RefusedError as error:
                if not self._connections:
                    self._failed(error)
                    return
                gone_since = self._lost(error, gone_since)
            except OutputError as error:
                gone_since = self._lost(error, gone_since)
            except Exception as error:  # a defect here must not end the other outputs
                log.debug("delivery", exc_info=error)
                gone_since = self._lost(OutputError(f"{self.address}: {type(error).__name__}"), gone_since)
        self._set(DeliveryPhase.CLOSED)

    def _session(self) -> None:
        """Connect and deliver until the end or an error."""
        self._set(DeliveryPhase.CONNECTING)
        connection = self._connect()
        with self._changed:
            self._connection = connection
            self._connections += 1
            self._needs_keyframe = True
            self._phase = DeliveryPhase.LIVE
        self._want_keyframe()
        log.info(
            "%s: live%s", self.address, f" again (connection {self._connections})" * (self._connections > 1)
        )
        before = self._sent
        try:
            self._deliver(connection)
        except BaseException as error:
            connection.shut()
            if isinstance(error, OutputError) and self._sent == before:  # how many servers treat a wrong key
                raise type(error)(
                    f"{error}; it took nothing: check host, application and stream key"
                ) from error
            raise
        finally:
            self._connection = None

    def _deliver(self, connection: Connection) -> None:
        while not (self._closing and not self._packets):
            if packet := self._next():
                self._deliver_one(connection, packet)
            else:
                connection.idle()
        connection.close()

    def _deliver_one(self, connection: Connection, packet: LivePacket) -> None:
        try:
            connection.deliver(packet)
        except BaseException:
            with self._changed:
                self._dropped += 1
            raise
        with self._changed:
            self._sent += 1

    def _next(self) -> LivePacket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._packets or self._closing, IDLE_SECONDS)
            return self._packets.popleft() if self._packets else None

    def _lost(self, error: OutputError, gone_since: float) -> float:
        """Note a failure and wait before the next attempt; returns since when the target is gone."""
        was_live = self._phase is DeliveryPhase.LIVE
        now = self._clock()
        gone_since = now if was_live else gone_since
        shortest, longest = self._backoff
        wait = min(longest, max(shortest, (now - gone_since) / 3))
        news = (
            was_live or str(error) != self._error
        )  # else the target's state says it, and the log has said it
        log.log(
            logging.WARNING if news else logging.INFO,
            "%s; next attempt in %.0f s",
            error,
            wait,
        )
        with self._changed:
            self._phase, self._error = DeliveryPhase.WAITING, str(error)
            self._dropped += len(self._packets)
            self._packets.clear()
            self._changed.wait_for(lambda: self._closing, wait)
        return gone_since

    def _failed(self, error: OutputError) -> None:
        log.error("%s", error)
        with self._changed:
            self._phase, self._error = DeliveryPhase.FAILED, str(error)

    def _set(self, phase: DeliveryPhase) -> None:
        with self._changed:
            self._phase = phase
