"""The panel's input line: what is typed becomes the commands that the control socket takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wanrt.errors import UsageError, WanrtError
from wanrt.panel import Typed
from wanrt.panel.editor import Event, LineEditor
from wanrt.pipeline.control import Handler, read_settings

PLAIN = {"pause": "paused; /resume goes on", "resume": "going on", "stop": "stopping"}
KNOWN = "/blend TIME PROMPT, /seed N, /set bias=B steps=LIST, /pause, /resume, /stop"


def request(line: str) -> tuple[str, Mapping[str, Any]]:
    """Command and fields of a typed line: a prompt, or a word after a slash.

    Raises `UsageError` for an unknown word, or words that are missing or too many.
    """
    if not line.startswith("/"):
        return "say", {"prompt": line}
    word, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if word == "blend":
        seconds, _, prompt = rest.partition(" ")
        if not prompt.strip():
            raise UsageError("/blend: expected a time and a prompt, such as /blend 2s a green star")
        return "say", {"prompt": prompt.strip(), "blend": seconds}
    if word == "seed":
        return "seed", {"seed": rest}
    if word == "set":
        return "set", read_settings(rest.split())
    if word not in PLAIN:
        raise UsageError(f"/{word[:40]}: expected {KNOWN}")
    if rest:
        raise UsageError(f"/{word}: takes nothing else")
    return word, {}


class InputLine:
    """One run's input line.

    Args:
        handle: obeys commands; raises WanrtError to refuse.
        show: is given the line after every change; returns False when nobody can see it any more.
    """

    def __init__(self, handle: Handler, show: Callable[[Typed], bool]) -> None:
        self._handle, self._show = handle, show
        self._editor = LineEditor()
        self._answer, self._refused, self._resumed = "", False, 0

    def show(self) -> bool:
        """Shows the line; whether it can be seen."""
        now = Typed(self._editor.text, self._editor.cursor, self._answer, self._refused, self._resumed)
        return self._show(now)

    def take(self, events: list[Event]) -> bool:
        """Edits the line, obeys those that Enter finished, and shows it; whether it can be seen."""
        for event in events:
            line = self._editor.feed(event)
            if line is not None:
                self._obey(line)
            elif self._editor.text:
                self._answer, self._refused = "", False
        return self.show()

    def resumed(self) -> None:
        """The terminal has come back from another program."""
        self._resumed += 1
        self.show()

    def _obey(self, line: str) -> None:
        try:
            command, fields = request(line)
            answer = self._handle(command, fields)
            self._answer = PLAIN.get(command) or f"from chunk {answer['chunk']}: {line}"
            self._refused = False
        except WanrtError as refused:
            self._answer, self._refused = str(refused), True
