"""Where a live stream goes: an address whose secret part is never shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from wanrt.errors import UsageError

DEFAULT_PORTS = {"rtmp": 1935, "rtmps": 443, "srt": None, "udp": None}
SHAPES = {
    "rtmp": "rtmp://HOST[:PORT]/APP/KEY",
    "rtmps": "rtmps://HOST[:PORT]/APP/KEY",
    "srt": "srt://HOST:PORT[?OPTIONS]",
    "udp": "udp://HOST:PORT",
}


@dataclass(frozen=True)
class Address:
    """A live target. `str` and `repr` name scheme and host alone: a stream key is a password.

    Attributes:
        scheme: rtmp, rtmps, srt or udp.
        host: name or number.
        port: given, or the scheme's own.
        app: RTMP application, "" for others.
        key: RTMP stream key with its query; secret.
        url: all of it; secret.
    """

    scheme: str
    host: str
    port: int
    app: str = ""
    key: str = field(default="", repr=False)
    url: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a URL.

        Raises:
            UsageError: for a scheme, host, port, application or key that is missing or wrong; names no key.
        """
        scheme = url.partition("://")[0].lower() if "://" in url else ""
        if scheme not in DEFAULT_PORTS:
            got = f"scheme {scheme!r}" if scheme else "no scheme"
            raise UsageError(f"live output: {got}, expected one of {', '.join(SHAPES.values())}")
        host, port = _host_and_port(url, scheme)
        if scheme not in ("rtmp", "rtmps"):
            return cls(scheme, host, port, url=url)
        parts = urlsplit(url)
        app, _, key = parts.path.strip("/").rpartition("/")
        if not app or not key:
            raise UsageError(
                f"{scheme}://{host}: application or stream key is missing, expected {SHAPES[scheme]}"
            )
        return cls(scheme, host, port, app, key + (f"?{parts.query}" if parts.query else ""), url)

    @property
    def tc_url(self) -> str:
        """RTMP's `tcUrl`: everything but the key."""
        return f"{self.scheme}://{self.host}:{self.port}/{self.app}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}"

    def redact(self, text: str) -> str:
        """`text` without this address's secrets."""
        for secret in (self.url, self.key):
            if secret:
                text = text.replace(secret, "***")
        return text


def hide_keys(text: str) -> str:
    """`text` with nothing but scheme and host left of every live address in it: for messages of others."""
    return re.sub(r"(?i)\b((?:rtmps?|srt|udp)://)(?:[^\s/@'\"]*@)?([^\s/:?'\"]*)[^\s'\"]*", r"\1\2", text)


def _host_and_port(url: str, scheme: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or DEFAULT_PORTS[scheme]
    except ValueError:  # its message may hold the URL
        host = port = None
    if not host or not port:
        raise UsageError(f"{scheme} output: host or port is missing or wrong, expected {SHAPES[scheme]}")
    return host, port
