"""A small local web page: the live stream, its statistics, and a box to type the next prompt into."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from wanrt.errors import OutputError, WanrtError

from .address import Address
from .feed import FeedTrack, FragmentFeed

log = logging.getLogger("wanrt.output")

Say = Callable[[str, float | None], int]
Stats = Callable[[], Mapping[str, object]]

PAGES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
LONGEST_BODY = 65_536  # bytes; a prompt of 10 kB fits in any alphabet
LONGEST_BLEND = 3600.0  # seconds
SOCKET_SECONDS = 30  # that a browser may read nothing
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; media-src blob:; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


class PageServer:
    """Serves the page at `url` from threads of its own until `close`; a live target of `LiveSink`.

    Whoever knows the URL may watch and steer: it holds a random token, and without it everything is "not
    found". Served to this machine alone unless `host` says otherwise.

    Args:
        say: takes a prompt and the seconds to blend over (None: the default), returns the first chunk it
        shows in;
            raises WanrtError for a prompt that it refuses. Called from server threads, one call at a time.
        stats: what the page shows, names to plain values. Called twice a second for each viewer.
        host: name or address to listen at.
        port: 0 for any that is free.
        token: instead of a random one.

    Raises:
        OutputError: the port is taken, or the host is none of this machine.
    """

    def __init__(
        self, say: Say, stats: Stats, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
    ) -> None:
        self._say, self._stats = say, stats
        self._saying = threading.Lock()
        self._token = token or secrets.token_urlsafe(16)
        self._feed: FragmentFeed | None = None
        try:
            self._server = _Server(host, port, self)
        except (OSError, OverflowError) as error:
            words = getattr(error, "strerror", None) or error
            raise OutputError(
                f"page: cannot listen at {host}:{port} ({words}); choose another port"
            ) from error
        self._host, self._port = host, int(self._server.server_address[1])
        if not is_loopback(host):
            log.warning("page: served at %s, to everybody there who knows the address with its token", host)
        serving = {"poll_interval": 0.1}  # seconds that `close` may take
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs=serving, name="wanrt-page", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """What to open in a browser; holds the token."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/{self._token}/"

    @property
    def address(self) -> Address:
        """Its name as a live target, without the token."""
        return Address("http", self._host, self._port)

    def open(self, track: FeedTrack) -> FragmentFeed:
        """Called by `LiveSink`: show this stream from now on."""
        self._feed = FragmentFeed(track)
        return self._feed

    def close(self) -> None:
        """Stop serving."""
        if self._feed:
            self._feed.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # what requests need

    @property
    def feed(self) -> FragmentFeed | None:
        """The stream; None before it has begun."""
        return self._feed

    def owns(self, token: str) -> bool:
        """Whether this is the token, compared in constant time."""
        return hmac.compare_digest(token.encode(), self._token.encode())

    def say(self, text: str, blend: float | None) -> int:
        """Hand a prompt on."""
        with self._saying:
            return self._say(text, blend)

    def stats(self) -> dict[str, object]:
        """What the page shows, with the number of viewers."""
        viewers = self._feed.readers if self._feed else 0
        return {**self._stats(), "viewers": viewers}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a stalled viewer must not hold up the end

    def __init__(self, host: str, port: int, page: PageServer) -> None:
        self.page = page
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that goes away is no error worth a traceback on the terminal."""
        log.debug("page: a request failed", exc_info=True)


class BadRequestError(Exception):
    """A request that is refused: HTTP status and words."""

    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "wanrt", ""
    timeout = SOCKET_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Page files, info, stats and the stream."""
        self._answer({"info": self._info, "stats": self._stats, "stream": self._stream}, self._file)

    def do_POST(self) -> None:
        """A prompt."""
        self._answer({"say": self._say}, self._nothing)

    def _answer(self, known: Mapping[str, Callable[[], None]], other: Callable[[str], None]) -> None:
        token, slash, name = self.path.partition("?")[0].lstrip("/").partition("/")
        try:
            if not self.server.page.owns(token):
                raise BadRequestError(HTTPStatus.NOT_FOUND, "not found; open the address that wanrt printed")
            if not slash:
                self._send(HTTPStatus.PERMANENT_REDIRECT, b"", "text/plain", Location=f"/{token}/")
            elif name in known:
                known[name]()
            else:
                other(name)
        except BadRequestError as refused:
            self.close_connection = True  # a body may be left unread
            self._json({"error": str(refused)}, refused.status)

    def _nothing(self, name: str) -> None:
        raise BadRequestError(HTTPStatus.NOT_FOUND, "not found")

    def _file(self, name: str) -> None:
        if name not in PAGES:
            self._nothing(name)
        file, kind = PAGES[name]
        self._send(HTTPStatus.OK, files("wanrt.output").joinpath("page", file).read_bytes(), kind)

    def _info(self) -> None:
        feed = self.server.page.feed
        track = feed.track if feed else None
        facts = {"codec": track.codec, "width": track.spec.width, "height": track.spec.height,
                 "fps": round(float(track.spec.fps), 3)} if track else {}  # fmt: skip
        self._json(facts)

    def _stats(self) -> None:
        self._json(self.server.page.stats())

    def _say(self) -> None:
        text, blend = read_prompt(self._body())
        try:
            self._json({"chunk": self.server.page.say(text, blend)})
        except WanrtError as error:
            raise BadRequestError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":  # what a form of another site cannot send
            raise BadRequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        size = self.headers.get("Content-Length", "")
        if not size.isascii() or not size.isdigit():
            raise BadRequestError(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(size) > LONGEST_BODY:
            raise BadRequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {LONGEST_BODY} bytes"
            )
        return self.rfile.read(int(size))

    def _stream(self) -> None:
        feed = self.server.page.feed
        if feed is None:
            raise BadRequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the stream has not begun")
        reader = feed.read()
        try:
            self._head(HTTPStatus.OK, {"Content-Type": "video/mp4", "Transfer-Encoding": "chunked"})
            self._part(feed.track.header)
            for fragments in reader:
                if fragments:
                    self._part(fragments)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the viewer has gone
            self.close_connection = True
        finally:
            feed.leave(reader)

    def _part(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _json(self, value: Mapping[str, object], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(value, default=str).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in (HEADERS | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: their paths hold the token."""


def read_prompt(body: bytes) -> tuple[str, float | None]:
    """The prompt and blend seconds of a request.

    Raises:
        BadRequestError: for anything that is not {"text": "...", "blend": seconds or null}.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):  # broken JSON, broken UTF-8, a million brackets
        given = None
    text = given.get("text") if isinstance(given, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise BadRequestError(HTTPStatus.BAD_REQUEST, 'expected {"text": "a prompt", "blend": seconds}')
    blend = given.get("blend")
    if blend is None:
        return text.strip(), None
    if isinstance(blend, bool) or not isinstance(blend, int | float) or not 0 <= blend <= LONGEST_BLEND:
        raise BadRequestError(HTTPStatus.BAD_REQUEST, f"blend: expected 0 to {LONGEST_BLEND:g} seconds")
    return text.strip(), float(blend)
