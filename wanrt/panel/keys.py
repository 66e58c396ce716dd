"""From a terminal's bytes to keys and text (ECMA-48 sequences as xterm sends them). Pure: no terminal, no clock."""

from __future__ import annotations

import codecs
import re

from wanrt.panel.editor import Event, Key

PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"  # bracketed paste, xterm's control sequences, mode 2004
TOKEN = re.compile(
    r"\x1b\[\[[A-E]"  # function keys of the Linux console
    r"|\x1b\[(?P<csi>[0-?]*[ -/]*[@-~])"
    r"|\x1bO(?P<ss3>[ -~])"
    r"|\x1b(?P<alt>[^\x1b\[O])"
    r"|(?P<control>[\x00-\x1a\x1c-\x1f\x7f])"
    r"|(?P<text>[^\x00-\x1f\x7f]+)",
    re.DOTALL,
)
UNFINISHED = re.compile(r"\x1b(\[\[?|\[[0-?]*[ -/]*|O)?\Z")
CONTROLS = {
    "\r": Key.ENTER,
    "\n": Key.ENTER,
    "\x7f": Key.BACKSPACE,
    "\x08": Key.BACKSPACE,
    "\x01": Key.HOME,
    "\x02": Key.LEFT,
    "\x04": Key.DELETE,
    "\x05": Key.END,
    "\x06": Key.RIGHT,
    "\x0b": Key.ERASE_AFTER,
    "\x0e": Key.DOWN,
    "\x10": Key.UP,
    "\x15": Key.ERASE_BEFORE,
    "\x17": Key.ERASE_WORD,
}
SEQUENCES = {
    "A": Key.UP,
    "B": Key.DOWN,
    "C": Key.RIGHT,
    "D": Key.LEFT,
    "H": Key.HOME,
    "F": Key.END,
    "1~": Key.HOME,
    "7~": Key.HOME,
    "4~": Key.END,
    "8~": Key.END,
    "3~": Key.DELETE,
}
ALTS = {"\x7f": Key.ERASE_WORD, "\x08": Key.ERASE_WORD}


class KeyReader:
    """Takes bytes as they come, in any pieces. What it does not know it leaves out, whole."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._pasting = False

    @property
    def waiting(self) -> bool:
        """Whether the last byte may begin a sequence, or be the Escape key: `flush` when nothing follows soon."""
        return bool(self._rest) and not self._pasting

    def feed(self, data: bytes) -> list[Event]:
        """The keys and texts that `data` completes."""
        self._rest += self._decoder.decode(data)
        events: list[Event] = []
        while self._rest:
            before = self._rest
            events += self._pasted() if self._pasting else self._typed()
            if self._rest == before:
                break
        return events

    def flush(self) -> list[Event]:
        """Nothing followed: a lone escape is the Escape key, the beginning of a sequence is noise."""
        if not self.waiting:
            return []
        rest, self._rest = self._rest, ""
        return [Key.ESCAPE] if rest == "\x1b" else []

    def _pasted(self) -> list[Event]:
        """Text up to the end of the paste, or as much as has come of it."""
        text, end, after = self._rest.partition(PASTE_END)
        if end:
            self._pasting, self._rest = False, after
        else:
            held = next((n for n in range(len(PASTE_END) - 1, 0, -1) if text.endswith(PASTE_END[:n])), 0)
            text, self._rest = text[: len(text) - held], text[len(text) - held :]
        return [text] if text else []

    def _typed(self) -> list[Event]:
        """The first token's event, if it is one."""
        token = TOKEN.match(self._rest)
        if token is None:
            if UNFINISHED.match(self._rest):
                return []
            broken, self._rest = self._rest[:2], self._rest[1:]
            return [Key.ESCAPE] if broken == "\x1b\x1b" else []
        self._rest = self._rest[token.end() :]
        if token[0] == PASTE_BEGIN:
            self._pasting = True
            return []
        event = _event(token)
        return [] if event is None else [event]


def _event(token: re.Match[str]) -> Event | None:
    if token["text"]:
        return token["text"]
    if token["control"]:
        return CONTROLS.get(token["control"])
    return ALTS.get(token["alt"] or "") or SEQUENCES.get(token["csi"] or token["ss3"] or "")
