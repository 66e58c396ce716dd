"""The panel on a terminal: painted in place, ten times a second, by a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import COLOR_SYSTEMS, Console
from rich.segment import Segment
from rich.text import Text

from wanrt.panel import layout
from wanrt.panel.bars import ASCII, UNICODE
from wanrt.panel.plain import summary_lines
from wanrt.panel.snapshot import Snapshot, Summary, Typed
from wanrt.panel.words import one_line

BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"  # synchronised update: terminals that know it show a paint at once
ERASE_LINE, ERASE_BELOW = "\x1b[K", "\x1b[J"
INTERVAL_S = 0.1

Size = Callable[[], tuple[int, int]]


class Painter:
    """Lines that stay at the bottom of what was printed, rewritten in place. No cursor is hidden, no mode is
    left set.

    A paint goes back to the panel's first row and rewrites the rows that changed, in one write; so nothing
    flickers, and the screen scrolls only when the panel first needs room.
    """

    def __init__(self, stream: TextIO, console: Console, size: Size) -> None:
        self._stream = stream
        self._console = console
        self._size = size
        self._shown: list[Text] = []
        self._codes: list[str] = []
        self._columns = 0

    def paint(self, lines: list[Text], above: Sequence[Text] = ()) -> None:
        """Show `lines` in the place of those shown before; `above` scrolls by over them, for good."""
        columns = self._size()[0]
        codes = [self._encode(line) for line in lines]
        out = [BEGIN, self._home(columns)]
        if above or columns != self._columns or len(codes) < len(self._codes):
            out.append(ERASE_BELOW)
            self._codes = []
        out += [f"{self._encode(line)}\n" for line in above]
        for code, old in itertools.zip_longest(codes, self._codes[: len(codes)]):
            out.append("\n" if code == old else f"{code}{ERASE_LINE}\n")
        self._stream.write("".join([*out, END]))
        self._stream.flush()
        self._shown, self._codes, self._columns = lines, codes, columns

    def print(self, lines: Sequence[Text]) -> None:
        """Let `lines` scroll by above the panel, which stays."""
        self.paint(self._shown, lines)

    def forget(self) -> None:
        """Others have written since: the next paint begins where the cursor is."""
        self._shown, self._codes = [], []

    def _home(self, columns: int) -> str:
        """To the panel's first row. A terminal made narrower has wrapped the rows since they were written."""
        rows = sum(max(1, -(-line.cell_len // max(1, columns))) for line in self._shown)
        rows = min(rows, self._size()[1])
        return f"\r\x1b[{rows}A" if rows else "\r"

    def _encode(self, text: Text) -> str:
        """`text` with the escape codes of this terminal; without colours, bold and reverse stay."""
        segments = Text.assemble(text).render(self._console)
        if self._console.no_color:
            segments = Segment.remove_color(segments)
        system = COLOR_SYSTEMS.get(self._console.color_system or "")
        return "".join(s.style.render(s.text, color_system=system) if s.style else s.text for s in segments)


class LivePanel:
    """Observer that paints. `update` only stores the snapshot: the run never waits for the terminal.

    An error while painting is kept and raised from the next call, so that whoever holds the panel can go on
    with plain lines. With `thread=False` nothing is painted until `paint` is called (tests).

    `foreground`: whether the terminal is this process's. Sent to the background, the panel leaves the screen to
    others, and begins anew when it is back. One that was never in the foreground (`timeout wanrt ...`) paints.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        size: Size,
        clock: Callable[[], float],
        console: Console,
        thread: bool = True,
        foreground: Callable[[], bool] = lambda: True,
    ) -> None:
        self._painter = Painter(stream, console, size)
        self._size = size
        self._clock = clock
        self._glyphs = UNICODE if (console.encoding or "").startswith("utf") else ASCII
        self._snapshot: Snapshot | None = None
        self._taken_s = 0.0
        self._typed: Typed | None = None
        self._foreground = foreground
        self._was_here = self._away = False
        self._lock = threading.Lock()
        self._begun = threading.Event()  # there is something to paint, or nothing ever will be
        self._stop = threading.Event()
        self._due = threading.Event()  # a paint before its time
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="wanrt-panel", daemon=True) if thread else None
        if self._thread:
            self._thread.start()

    def update(self, snapshot: Snapshot) -> None:
        """Take the newest state."""
        self._raise()
        with self._lock:
            self._taken_s = self._clock() if snapshot.at_s is None else snapshot.at_s
            self._snapshot = snapshot
        self._begun.set()

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Print `line` above the panel."""
        self._raise()
        style = layout.BAD if level >= logging.ERROR else layout.WARN if level >= logging.WARNING else ""
        with self._lock:
            self._may_paint()
            self._painter.print([Text(one_line(line), style)])

    def typing(self, typed: Typed) -> bool:
        """Show the input line at once: a typist waits for every letter."""
        self._raise()
        with self._lock:
            if self._typed and typed.resumed != self._typed.resumed:
                self._painter.forget()
            self._typed = typed
        self._due.set()
        return True

    def close(self, summary: Summary | None = None) -> None:
        """Stop painting, take the panel away, and leave the summary in its place."""
        self._stop.set()
        self._begun.set()
        self._due.set()
        if self._thread:
            self._thread.join(timeout=2)
        self._raise()
        with self._lock:
            self._may_paint()
            self._painter.paint([], self._farewell(summary) if summary else ())

    def _farewell(self, summary: Summary) -> list[Text]:
        first, *rest = summary_lines(summary, self._glyphs)
        mark, _, words = first.partition(" ")
        style = layout.WARN if summary.stopped else layout.GOOD
        return [
            Text.assemble((mark, f"bold {style}"), " ", words),
            *(Text(line, layout.DIM) for line in rest),
        ]

    def paint(self) -> None:
        """Show the newest snapshot as of now."""
        with self._lock:
            if self._snapshot is None or not self._may_paint():
                return
            columns, rows = self._size()
            age = max(0.0, self._clock() - self._taken_s)
            view = layout.View(columns, rows, self._glyphs, age, self._typed)
            self._painter.paint(layout.lines(self._snapshot, view))

    def _may_paint(self) -> bool:
        """Whether the panel may be shown; what was shown before is forgotten when others may have written since."""
        here = self._foreground()
        self._was_here |= here
        away = self._was_here and not here
        if away or self._away:
            self._painter.forget()
        self._away = away
        return not away

    def _run(self) -> None:
        self._begun.wait()  # the first snapshot is shown at once: what follows may hold the interpreter for seconds
        while not self._stop.is_set():
            try:
                self.paint()
            except Exception as error:  # kept for _raise: a thread has nobody to raise to
                self._error = error
                return
            self._due.wait(INTERVAL_S)
            self._due.clear()

    def _raise(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error
