"""A line of text under edit: keys in, text, cursor and finished lines out. Pure: no terminal, no clock."""

from __future__ import annotations

from enum import Enum, auto

from rich.cells import cell_len

from wanrt.panel import words

LONGEST = 10_000  # characters: more than any model reads of a prompt, little enough to draw at every key
REMEMBERED = 100  # lines of history
JOINER = "\u200d"  # glues two characters into one picture (ZERO WIDTH JOINER, Unicode chapter 23.2)


class Key(Enum):
    """A key that is no text."""

    ENTER = auto()
    ESCAPE = auto()
    BACKSPACE = auto()
    DELETE = auto()
    LEFT = auto()
    RIGHT = auto()
    HOME = auto()
    END = auto()
    UP = auto()
    DOWN = auto()
    ERASE_BEFORE = auto()
    ERASE_AFTER = auto()
    ERASE_WORD = auto()


Event = Key | str  # a key, or text that was typed or pasted


class LineEditor:
    """One line and the lines before it.

    Text is taken without what a terminal would obey: line ends and controls become spaces, so that pasted text is
    never sent by itself. The cursor stands between characters as people see them: accents, and pictures of several
    code points, stay whole.
    """

    def __init__(self) -> None:
        self.text = ""
        self.cursor = 0  # code points before it
        self._history: list[str] = []
        self._at = 0  # in the history; its length: the line that is being written
        self._draft = ""

    def feed(self, event: Event) -> str | None:
        """Obeys one event; the line, without spaces around it, when Enter finished one that is not blank."""
        if isinstance(event, str):
            self._insert(event)
            return None
        if event is Key.ENTER:
            return self._finish()
        if event in (Key.UP, Key.DOWN):
            self._recall(self._at + (1 if event is Key.DOWN else -1))
        else:
            self._edit(event)
        return None

    def _insert(self, text: str) -> None:
        clean = words.visible(text.replace("\r\n", "\n"))[: LONGEST - len(self.text)]
        self.text = self.text[: self.cursor] + clean + self.text[self.cursor :]
        self.cursor += len(clean)

    def _finish(self) -> str | None:
        line = self.text.strip()
        self.text, self.cursor = "", 0
        if line and self._history[-1:] != [line]:
            self._history = [*self._history, line][-REMEMBERED:]
        self._at = len(self._history)
        return line or None

    def _recall(self, at: int) -> None:
        if not 0 <= at <= len(self._history) or at == self._at:
            return
        if self._at == len(self._history):
            self._draft = self.text
        self._at = at
        self.text = self._draft if at == len(self._history) else self._history[at]
        self.cursor = len(self.text)

    def _edit(self, key: Key) -> None:
        text, at = self.text, self.cursor
        match key:
            case Key.LEFT:
                self.cursor = previous_stop(text, at)
            case Key.RIGHT:
                self.cursor = next_stop(text, at)
            case Key.HOME:
                self.cursor = 0
            case Key.END:
                self.cursor = len(text)
            case Key.BACKSPACE:
                self._erase(previous_stop(text, at), at)
            case Key.DELETE:
                self._erase(at, next_stop(text, at))
            case Key.ERASE_WORD:
                self._erase(_word(text, at), at)
            case Key.ERASE_BEFORE:
                self._erase(0, at)
            case Key.ERASE_AFTER:
                self._erase(at, len(text))
            case Key.ESCAPE:
                self._erase(0, len(text))
                self._at = len(self._history)

    def _erase(self, start: int, end: int) -> None:
        self.text = self.text[:start] + self.text[end:]
        self.cursor = start


def _joined(text: str, at: int) -> bool:
    """Whether no cursor may stand before character `at`: it belongs to the one before."""
    return 0 < at < len(text) and (cell_len(text[at]) == 0 or text[at - 1] == JOINER)


def previous_stop(text: str, at: int) -> int:
    """Where the cursor stands one step to the left of `at`."""
    at = max(0, at - 1)
    while _joined(text, at):
        at -= 1
    return at


def next_stop(text: str, at: int) -> int:
    """Where the cursor stands one step to the right of `at`."""
    at = min(len(text), at + 1)
    while _joined(text, at):
        at += 1
    return at


def _word(text: str, at: int) -> int:
    """Where the word before `at` begins."""
    return len(text[:at].rstrip().rpartition(" ")[0]) + bool(" " in text[:at].rstrip())
