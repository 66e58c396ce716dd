"""A TOML text with the line of every key, so that an error can say where.

`tomllib` says whether the text is TOML and what it means, but not where a key stood. The scanner
here walks a text that `tomllib` has already accepted, so it needs to know where things are, not whether
they are right: keys, table headers, inline tables, arrays, strings and comments (TOML 1.0, toml.io).
"""

from __future__ import annotations

import bisect
import re
import tomllib
from dataclasses import dataclass, field
from typing import Any

from wanrt.errors import ScriptError
from wanrt.script.units import printable

Path = tuple[str | int, ...]

MAX_BYTES = 1 << 20  # a prompt file is a page; a megabyte is somebody's video given by mistake


@dataclass(frozen=True)
class Source:
    """Parsed TOML: where it came from, its tables, and the line (from 1) of each path into them.

    A path is keys and list indices, such as ("scene", 1, "prompt").
    """

    name: str
    data: dict[str, Any]
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest part of it that the text has (a missing key: its table)."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return 1


def parse(raw: bytes, name: str) -> Source:
    """Read TOML. Raises ScriptError with file, line and what to do for anything that is not TOML in UTF-8."""
    if len(raw) > MAX_BYTES:
        raise ScriptError(
            f"{name}:1: got more than {MAX_BYTES:,} bytes; a prompt file is a page: is it the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        line = raw.count(b"\n", 0, bad.start) + 1
        raise ScriptError(
            f"{name}:{line}: got byte 0x{raw[bad.start]:02x}, which is not UTF-8 text; "
            "expected a TOML file (save it as UTF-8)"
        ) from None
    text = text.replace("\r\n", "\n")
    data, lines = _load(text, name)
    return Source(name, data, lines)


def _load(text: str, name: str) -> tuple[dict[str, Any], dict[Path, int]]:
    try:
        return tomllib.loads(text), Scanner(text).scan()
    except tomllib.TOMLDecodeError as bad:
        raise ScriptError(
            f"{name}:{_bad_line(bad, text)}: not TOML: {_reason(bad)} (see man wanrt-prompt)"
        ) from None
    except (ValueError, RecursionError) as bad:  # integers of 5,000 digits, arrays nested 1,000 deep
        why = (
            "brackets nested too deep" if isinstance(bad, RecursionError) else "a number with too many digits"
        )
        raise ScriptError(f"{name}:1: not a prompt file: {why} (see man wanrt-prompt)") from None


def _bad_line(bad: tomllib.TOMLDecodeError, text: str) -> int:
    """The line that tomllib's message names; the last line when it says "at end of document"."""
    match = re.search(r"\(at line (\d+), column \d+\)", str(bad))
    return int(match[1]) if match else text.rstrip("\n").count("\n") + 1


def _reason(bad: tomllib.TOMLDecodeError) -> str:
    """tomllib's message on one line, without its position, and quoted text that cannot be printed escaped."""
    text = re.sub(r"\s*\(at (line \d+, column \d+|end of document)\)", "", str(bad).splitlines()[0])
    return printable(text)


_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_INLINE_BLANK = re.compile(r"[ \t]*")
_ATOM = re.compile(r"[^,\]\}\n#]*")
_STRINGS = (
    re.compile(r'"""(?:\\.|(?!""")[^\\])*"""("{0,2})', re.DOTALL),
    re.compile(r"'''(?:(?!''').)*'''('{0,2})", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\\n])*"'),
    re.compile(r"'[^'\n]*'"),
)


@dataclass
class Scanner:
    """Walks valid TOML once and notes the line of every key, table and list entry."""

    text: str
    at: int = 0
    lines: dict[Path, int] = field(default_factory=dict)
    newlines: list[int] = field(default_factory=list)
    counts: dict[Path, int] = field(default_factory=dict)  # entries of each [[array of tables]]

    def scan(self) -> dict[Path, int]:
        """Lines (from 1) by path."""
        self.newlines = [match.start() for match in re.finditer("\n", self.text)]
        table: Path = ()
        while self._skip(_BLANK) < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
        return self.lines

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.at

    def _note(self, path: Path) -> None:
        self.lines.setdefault(path, bisect.bisect_left(self.newlines, self.at) + 1)

    def _header(self) -> Path:
        """`[a.b]` or `[[a.b]]`; returns where its keys belong."""
        many = self.text.startswith("[[", self.at)
        line_at = self.at
        self.at += 2 if many else 1
        keys = self._keys()
        self.at, end = line_at, self.at + (2 if many else 1)
        path = self._descend((), keys, last=many)
        if many:
            self.counts[path] = self.counts.get(path, -1) + 1
            path = (*path, self.counts[path])
        self._note(path)
        self.at = end
        return path

    def _descend(self, base: Path, keys: list[str], *, last: bool) -> Path:
        """`base` and `keys`, through the newest entry of every array of tables on the way (`last`: but not at
        the end).
        """
        path = base
        for i, key in enumerate(keys):
            path = (*path, key)
            self._note(path)
            if path in self.counts and not (last and i == len(keys) - 1):
                path = (*path, self.counts[path])
        return path

    def _keys(self) -> list[str]:
        """A dotted key; stops after it and the blanks that follow."""
        keys = []
        while True:
            self._skip(_INLINE_BLANK)
            keys.append(self._key())
            self._skip(_INLINE_BLANK)
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def _key(self) -> str:
        start = self.at
        if self.text[start] not in "\"'":
            self._skip(_BARE)
            return self.text[start : self.at]
        self._string()
        quoted = self.text[start : self.at]
        # Escapes are tomllib's business: let it read the one key.
        return next(iter(tomllib.loads(f"{quoted} = 0")))

    def _pair(self, table: Path) -> None:
        """`key = value`, below `table`."""
        start = self.at
        keys = self._keys()
        self.at, after = start, self.at
        path = self._descend(table, keys, last=True)
        self.at = after + 1  # over the equals sign
        self._skip(_INLINE_BLANK)
        self._value(path)

    def _value(self, path: Path) -> None:
        opening = self.text[self.at : self.at + 1]
        if opening and opening in "\"'":
            self._string()
        elif opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline(path)
        else:
            self._skip(_ATOM)

    def _string(self) -> None:
        """Any of the four kinds; the triple-quoted ones may end in up to two more quotes."""
        for pattern in _STRINGS:
            match = pattern.match(self.text, self.at)
            if match is not None:
                self.at = match.end()
                return
        raise AssertionError(f"no string at {self.at}: tomllib accepted what the scanner cannot read")

    def _array(self, path: Path) -> None:
        self.at += 1
        index = 0
        while self.text[self._skip(_BLANK)] != "]":
            self._note((*path, index))
            self._value((*path, index))
            self._skip(_BLANK)
            index += 1
            if self.text[self.at] == ",":
                self.at += 1
        self.at += 1

    def _inline(self, path: Path) -> None:
        self.at += 1
        while self.text[self._skip(_BLANK)] != "}":
            self._pair(path)
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1
        self.at += 1
