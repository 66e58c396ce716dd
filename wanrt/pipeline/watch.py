"""A prompt file that is read again whenever it is saved."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.script import RenderJob

POLL_S = 0.5


class FileWatch:
    """Looks at `path` twice a second on a thread of its own, until `close`.

    Args:
        path: the file. Editors that replace it are followed; while it is gone, nothing happens.
        read: the job that it describes now; raises UsageError for a broken edit, which is logged once.
        take: is given the job of a good edit; returns the first chunk made with it.
        tell: is given a line, and a level of `logging`, to show.
        fixed: names what a job asks for that only a restart would give.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[], RenderJob],
        take: Callable[[RenderJob], int],
        tell: Callable[[str, int], None],
        fixed: Callable[[RenderJob], Sequence[str]] = lambda job: (),
    ) -> None:
        self._path, self._read, self._take, self._tell, self._fixed = path, read, take, tell, fixed
        self._seen = self._stamp()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wanrt-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(POLL_S):
            now = self._stamp()
            if now is not None and now != self._seen:
                self._seen = now
                self._reread()

    def _reread(self) -> None:
        try:
            job = self._read()
            chunk = self._take(job)
            self._tell(f"{self._path}: read again, shown from chunk {chunk}", logging.INFO)
            if keys := ", ".join(self._fixed(job)):
                words = f"{self._path}: {keys}: as before; a running stream cannot change that, a restarted one can"
                self._tell(words, logging.WARNING)
        except UsageError as broken:
            for line in str(broken).splitlines():
                self._tell(line, logging.WARNING)
            self._tell(f"{self._path}: this edit is not used; the stream goes on as before", logging.WARNING)

    def _stamp(self) -> tuple[int, int, int] | None:
        """What changes when a file is saved; None while it is not there."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
