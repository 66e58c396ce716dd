"""An RTMP publisher over a socket of its own.

Why not FFmpeg's: its connect and writes wait inside the library, so a host that does not answer would stop
the whole process, a server that stops reading could not be told from a slow one, and error texts hold the
stream key.

Protocol: Adobe, "Real-Time Messaging Protocol (RTMP) specification", 1.0, 2012: section 5.2 handshake, 5.3
chunks, 5.4 control messages, 7.2 commands.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from wanrt.errors import OutputError

from . import amf
from .address import Address
from .flv import SCRIPT, Tag

HANDSHAKE = 1536
CHUNK_OUT = 4096
FLASH_VERSION = "FMLE/3.0 (compatible; wanrt)"

SET_CHUNK_SIZE, ACKNOWLEDGEMENT, USER_CONTROL, WINDOW_SIZE, COMMAND = 1, 3, 4, 5, 20
PING, PONG = 6, 7
CONTROL_CHUNKS, COMMAND_CHUNKS, PUBLISH_CHUNKS, MEDIA_CHUNKS = 2, 3, 4, 6  # chunk stream ids


class RefusedError(OutputError):
    """The server answered and said no: a wrong application or key, or a key in use."""


@dataclass
class _Incoming:
    """A message that arrives in chunks."""

    kind: int = 0
    size: int = 0
    data: bytes = b""


def bound_unsent(line: socket.socket, size: int) -> None:
    """Lets about `size` bytes wait in the system for a network that takes nothing, in place of megabytes.

    A live stream is late by what waits there, whatever its own queue drops. Linux and macOS, tcp(7); elsewhere
    nothing changes.
    """
    option = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)
    if option is not None:
        with suppress(OSError):
            line.setsockopt(socket.IPPROTO_TCP, option, size)


class RtmpConnection:
    """A connected publisher. `send` and `close` from one thread; `shut` from any.

    Args:
        address: where to.
        connect_seconds: for connecting and every answer of the server until publishing has begun.
        stall_seconds: how long the server may accept no byte before `send` gives up.
        unsent_bytes: that may wait in the system below `send`; None for as many as it likes.

    Raises:
        RefusedError: the server refuses application or key.
        OutputError: it is not there, does not answer, or speaks no RTMP.
    """

    def __init__(
        self,
        address: Address,
        *,
        connect_seconds: float = 10.0,
        stall_seconds: float = 10.0,
        unsent_bytes: int | None = None,
    ) -> None:
        self.address = address
        self._stall = stall_seconds
        self._received = self._acknowledged = 0
        self._window = 0
        self._chunk_in = 128
        self._incoming: dict[int, _Incoming] = {}
        self._buffer = b""
        self._deadline = time.monotonic() + connect_seconds
        self._socket = self._connect(connect_seconds)
        if unsent_bytes is not None:
            bound_unsent(self._socket, unsent_bytes)
        try:
            self._handshake()
            self._stream = self._publish()
        except RefusedError:
            self.shut()
            raise
        except OutputError as error:  # many servers refuse by hanging up
            self.shut()
            raise OutputError(f"{error}; check host, application and stream key") from None

    # sending

    def send(self, tag: Tag) -> None:
        """Send one tag, after hearing out what the server has said meanwhile.

        Raises:
            OutputError: the connection is gone, or nothing was accepted for `stall_seconds`.
        """
        self.listen()
        body = amf.encode("@setDataFrame") + tag.body if tag.kind == SCRIPT else tag.body
        self._send_message(MEDIA_CHUNKS, tag.kind, body, tag.milliseconds, self._stream)

    def close(self) -> None:
        """Say goodbye and close; harmless on a broken connection."""
        try:
            self._stall = 1.0
            self._command(COMMAND_CHUNKS, 0, "FCUnpublish", 6, None, self.address.key)
            self._command(COMMAND_CHUNKS, 0, "deleteStream", 7, None, float(self._stream))
        except OutputError:
            pass
        self.shut()

    def shut(self) -> None:
        """Close at once; a `send` under way in another thread fails."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send_message(self, chunks: int, kind: int, body: bytes, stamp: int = 0, stream: int = 0) -> None:
        """One message as one chunk of header type 0 and its continuations of type 3."""
        long_stamp = stamp.to_bytes(4, "big") if stamp >= 0xFFFFFF else b""
        head = bytes([chunks]) + min(stamp, 0xFFFFFF).to_bytes(3, "big") + len(body).to_bytes(3, "big")
        head += bytes([kind]) + stream.to_bytes(4, "little") + long_stamp
        parts = [head, body[:CHUNK_OUT]]
        for at in range(CHUNK_OUT, len(body), CHUNK_OUT):
            parts += [bytes([0xC0 | chunks]), long_stamp, body[at : at + CHUNK_OUT]]
        self._send_bytes(b"".join(parts))

    def _send_bytes(self, data: bytes) -> None:
        view = memoryview(data)
        self._socket.settimeout(self._stall)
        try:
            while view:
                view = view[self._socket.send(view) :]
        except TimeoutError:
            raise self._error(f"accepted nothing for {self._stall:g} s") from None
        except OSError as error:
            raise self._error(error.strerror or str(error)) from None

    def _command(self, chunks: int, stream: int, *values: amf.Value) -> None:
        self._send_message(chunks, COMMAND, amf.encode(*values), 0, stream)

    # opening

    def _connect(self, seconds: float) -> socket.socket:
        address = self.address
        try:
            plain = socket.create_connection((address.host, address.port), seconds)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.scheme == "rtmp":
                return plain
            return ssl.create_default_context().wrap_socket(plain, server_hostname=address.host)
        except TimeoutError:
            raise self._error(f"no answer within {seconds:g} s") from None
        except OSError as error:
            raise self._error(error.strerror or str(error)) from None

    def _handshake(self) -> None:
        self._send_bytes(b"\x03" + bytes(8) + os.urandom(HANDSHAKE - 8))
        answer = self._read(1 + 2 * HANDSHAKE)
        if answer[0] != 3:
            raise self._error(f"answered with version {answer[0]}, expected 3; is it an RTMP server?")
        self._send_bytes(answer[1 : 1 + HANDSHAKE])

    def _publish(self) -> int:
        """From connect to NetStream.Publish.Start; returns the message stream id."""
        key = self.address.key
        self._send_message(CONTROL_CHUNKS, SET_CHUNK_SIZE, CHUNK_OUT.to_bytes(4, "big"))
        facts: amf.Value = {
            "app": self.address.app,
            "type": "nonprivate",
            "flashVer": FLASH_VERSION,
            "tcUrl": self.address.tc_url,
        }
        self._command(COMMAND_CHUNKS, 0, "connect", 1, facts)
        self._await_result(1)
        self._command(COMMAND_CHUNKS, 0, "releaseStream", 2, None, key)
        self._command(COMMAND_CHUNKS, 0, "FCPublish", 3, None, key)
        self._command(COMMAND_CHUNKS, 0, "createStream", 4, None)
        stream = self._await_result(4)[-1]
        if not isinstance(stream, int | float):
            raise self._error("gave no stream number")
        self._command(PUBLISH_CHUNKS, int(stream), "publish", 5, None, key, "live")
        while self._status(self._await_command()) != "NetStream.Publish.Start":
            pass
        return int(stream)

    def _await_result(self, transaction: int) -> list[amf.Value]:
        while True:
            values = self._await_command()
            if values[:2] == ["_error", transaction] and transaction != 2:
                raise RefusedError(f"{self.address}: refused: {self._reason(values)}")
            if values[:2] == ["_result", transaction]:
                return values
            self._status(values)

    def _await_command(self) -> list[amf.Value]:
        while True:
            kind, data = self._read_message()
            if kind == COMMAND:
                return self._decoded(data)
            self._control(kind, data)

    def _status(self, values: list[amf.Value]) -> str:
        """The code of an onStatus command; raises when it tells of an error."""
        last = values[-1] if values and values[0] == "onStatus" else None
        if not isinstance(last, dict):
            return ""
        code = str(last.get("code", ""))
        if last.get("level") == "error":
            raise RefusedError(f"{self.address}: refused: {self._reason(values)}")
        return code

    def _reason(self, values: list[amf.Value]) -> str:
        last = values[-1]
        facts = last if isinstance(last, dict) else {}
        words = [str(facts[name]) for name in ("code", "description") if facts.get(name)]
        text = " ".join(": ".join(words).split()) or "no reason given"
        return self.address.redact(f"{text}; check application and stream key")

    # receiving

    def listen(self) -> None:
        """Handle what has arrived, without waiting. Raises OutputError when the server has gone or refuses."""
        while self._buffer or self._decrypted() or select.select([self._socket], [], [], 0)[0]:
            self._deadline = time.monotonic() + self._stall
            kind, data = self._read_message()
            if kind == COMMAND:
                self._status(self._decoded(data))
            else:
                self._control(kind, data)

    def _decrypted(self) -> bool:
        """TLS holds bytes that `select` does not see."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def _control(self, kind: int, data: bytes) -> None:
        number = int.from_bytes(data[:4], "big")
        if kind == SET_CHUNK_SIZE:
            self._chunk_in = max(1, number & 0x7FFFFFFF)
        elif kind == WINDOW_SIZE:
            self._window = number
        elif kind == USER_CONTROL and int.from_bytes(data[:2], "big") == PING:
            self._send_message(CONTROL_CHUNKS, USER_CONTROL, PONG.to_bytes(2, "big") + data[2:6])
        if self._window and self._received - self._acknowledged >= self._window // 2:
            self._acknowledged = self._received
            count = (self._received & 0xFFFFFFFF).to_bytes(4, "big")
            self._send_message(CONTROL_CHUNKS, ACKNOWLEDGEMENT, count)

    def _decoded(self, data: bytes) -> list[amf.Value]:
        try:
            return amf.decode(data)
        except ValueError as error:
            raise self._error(str(error)) from None

    def _read_message(self) -> tuple[int, bytes]:
        """The next whole message: type and body."""
        while True:
            first = self._read(1)[0]
            chunks = first & 63
            if chunks < 2:  # ids above 63 take one or two bytes more
                chunks = 64 + int.from_bytes(self._read(chunks + 1), "little")
            message = self._incoming.setdefault(chunks, _Incoming())
            self._read_header(first >> 6, message)
            message.data += self._read(min(self._chunk_in, message.size - len(message.data)))
            if len(message.data) >= message.size:
                data, message.data = message.data, b""
                return message.kind, data

    def _read_header(self, form: int, message: _Incoming) -> None:
        head = self._read((11, 7, 3, 0)[form])
        if form < 2:
            message.size, message.kind = int.from_bytes(head[3:6], "big"), head[6]
            if message.size > 1 << 20:
                raise self._error(f"sent a message of {message.size} bytes; is it an RTMP server?")
        if form < 3 and head[:3] == b"\xff\xff\xff":
            self._read(4)

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise self._error("does not answer as an RTMP server does") from None
            except OSError as error:
                raise self._error(error.strerror or str(error)) from None
            if not data:
                raise self._error("closed the connection")
            self._received += len(data)
            self._buffer += data
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _error(self, words: str) -> OutputError:
        return OutputError(f"{self.address}: {self.address.redact(words)}")
