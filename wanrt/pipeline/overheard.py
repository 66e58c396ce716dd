"""What a process says on its stderr, followed while it runs."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

from wanrt.pipeline.startup import Say

PROGRESS = re.compile(r"\[\d+(?::\d\d)+\] (.*)")  # as `Startup` says it
TAIL_LINES = 20


class Overheard:
    """The file that a process's stderr goes to, from where it stands now.

    `listen` takes in what is new and passes lines of progress on to `say`; whoever owns the process calls it often.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self._path, self._say = path, say
        self._read_to = path.stat().st_size
        self._rest = ""
        self._doing, self._since_s = "", time.monotonic()
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)

    def listen(self) -> None:
        """Takes in the whole lines that were written since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read_to)
            new = file.read()
        self._read_to += len(new)
        *whole, self._rest = (self._rest + new.decode("utf-8", "replace")).split("\n")
        for line in filter(None, (line.strip() for line in whole)):
            self._take(line)

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if progress := PROGRESS.match(line):
            self._doing, self._since_s = progress[1], time.monotonic()
            self._say(line)

    def doing(self) -> str:
        """The last progress and for how long nothing came after it: `loading transformer (31 s)`; empty without."""
        return f"{self._doing} ({time.monotonic() - self._since_s:.0f} s)" if self._doing else ""

    def last_words(self) -> str:
        """The last line, if it is no progress: what the process ended with."""
        last = self._rest.strip() or (self.lines[-1] if self.lines else "")
        return "" if PROGRESS.match(last) else last
