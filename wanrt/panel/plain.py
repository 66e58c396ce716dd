"""The panel without a terminal: plain lines, nothing but warnings, or one JSON object per line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TextIO

from wanrt.panel import words
from wanrt.panel.bars import ASCII, Glyphs
from wanrt.panel.snapshot import Phase, Snapshot, Summary, Typed

JSON_SCHEMA = 1
PROMPT_CHARACTERS = 200  # of a prompt in a plain line; the file's metadata has it whole


def summary_lines(summary: Summary, glyphs: Glyphs = ASCII) -> list[str]:
    """What a run leaves behind: one line of facts, and the notes.

    `✓ out.mp4  240 frames (15.0 s) in 10.4 s  23.1 fps  1.82 MiB  first frame 1.2 s`
    """
    mark = glyphs.stopped if summary.stopped else glyphs.done
    video = "" if summary.video_seconds is None else f" ({words.seconds(summary.video_seconds)})"
    facts = [f"{summary.frames} frames{video} in {words.seconds(summary.seconds)}"]
    if summary.fps is not None:
        facts.append(f"{words.rate(summary.fps)} fps")
    if summary.size is not None:
        facts.append(words.size(summary.size))
    if summary.time_to_first_frame_s is not None:
        facts.append(f"first frame {words.seconds(summary.time_to_first_frame_s)}")
    if summary.stopped:
        facts.append(f"stopped: {words.one_line(summary.stopped)}")
    head = f"{mark} {words.one_line(summary.output)}"
    return ["  ".join([head, *facts]), *(f"  {note}" for note in summary.notes)]


def progress_line(snapshot: Snapshot) -> str:
    """A snapshot in one line: `[0:07] 154/240 frames  64 %  23.8 fps (mean 22.9)  0:04 left  mesh 92 %`."""
    if snapshot.phase is Phase.LOADING:
        return f"[{words.clock_time(snapshot.elapsed_s)}] {_loading(snapshot)}"
    total = "" if snapshot.frames_total is None else f"/{snapshot.frames_total}"
    parts = [f"{snapshot.frames_done}{total} frames"]
    if snapshot.frames_total:
        parts.append(words.percent(snapshot.frames_done / snapshot.frames_total))
    parts.append(f"{words.rate(snapshot.fps_now)} fps (mean {words.rate(snapshot.fps_mean)})")
    if snapshot.frames_total is not None:
        parts.append(f"{words.clock_time(snapshot.eta_s)} left")
    parts += [f"{row.name} {words.percent(row.busy_share)}" for row in snapshot.stages]
    parts += [f"{q.name} {q.depth}/{q.capacity}" for q in snapshot.queues]
    if snapshot.scene is not None:
        parts.append(f"scene {snapshot.scene}" + (f"/{snapshot.scenes}" if snapshot.scenes else ""))
    return f"[{words.clock_time(snapshot.elapsed_s)}] " + "  ".join(parts)


def _loading(snapshot: Snapshot) -> str:
    step = next((s for s in snapshot.load if s.state == "active"), None)
    if step is None:
        return "loading"
    share = "" if step.fraction is None else f" {words.percent(step.fraction)}"
    return f"loading {step.name}{share}" + (f" ({words.one_line(step.detail)})" if step.detail else "")


class PlainLines:
    """Observer that writes a whole line every `every_s` seconds, at a new scene and at the first frame.

    No carriage return, no escape code, no character the stream cannot encode.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float], every_s: float = 5.0) -> None:
        self._stream = stream
        self._clock = clock
        self._every_s = every_s
        self._start_s = self._next_s = clock()
        self._seen: tuple[object, ...] = ()
        self._scene: int | None = None
        self._warned: set[str] = set()

    def update(self, snapshot: Snapshot) -> None:
        """Write a line if one is due."""
        for warning in snapshot.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self.log(warning, logging.WARNING)
        active = next((s.name for s in snapshot.load if s.state == "active"), None)
        if snapshot.phase is Phase.LOADING and active is None:
            return
        self._announce(snapshot)
        state = (snapshot.phase, active, snapshot.scene, snapshot.frames_done > 0)
        now = self._clock()
        if state == self._seen and now < self._next_s:
            return
        self._seen = state
        self._next_s = now + self._every_s
        self._write(progress_line(replace(snapshot, elapsed_s=snapshot.elapsed_s or now - self._start_s)))

    def _announce(self, snapshot: Snapshot) -> None:
        """The prompt of a scene, once, when it begins."""
        if snapshot.scene is not None and snapshot.scene != self._scene and snapshot.prompt:
            self._scene = snapshot.scene
            self.log(
                f"scene {snapshot.scene}: {words.clipped(words.one_line(snapshot.prompt), PROMPT_CHARACTERS)}"
            )

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Write `line` now."""
        prefix = "" if level < logging.WARNING else f"{logging.getLevelName(level).lower()}: "
        self._write(prefix + words.one_line(line))

    def typing(self, typed: Typed) -> bool:
        """There is no input line."""
        return False

    def close(self, summary: Summary | None = None) -> None:
        """Write the summary."""
        if summary:
            for line in summary_lines(summary):
                self._write(line)

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class QuietLines:
    """Observer of `--quiet`: warnings and errors only."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float]) -> None:
        self._lines = PlainLines(stream, clock=clock)

    def update(self, snapshot: Snapshot) -> None:
        """Say nothing."""

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Write warnings and errors."""
        if level >= logging.WARNING:
            self._lines.log(line, level)

    def typing(self, typed: Typed) -> bool:
        """There is no input line."""
        return False

    def close(self, summary: Summary | None = None) -> None:
        """Say only why a run ended early."""
        if summary and summary.stopped:
            self._lines.close(summary)


class JsonLines:
    """Observer of `--json-progress`: one JSON object per line, at most one "progress" every `every_s`
    seconds.

    Every object has "schema" (1), "event" and "t" (seconds since the observer was made). By event:

    progress  every field of `Snapshot` but at_s, under the same names, plus eta_s; "phase" is loading,
    running
              or finishing; of each stage "blocks" is left out
    log       "level" (debug, info, warning, error, critical), "message"
    summary   every field of `Summary`; always the last object of a run that reached its end

    A change of phase or scene, the first frame and the last are always reported.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float], every_s: float = 0.5) -> None:
        self._stream = stream
        self._clock = clock
        self._start_s = clock()
        self._every_s = every_s
        self._next_s = self._start_s
        self._seen: tuple[object, ...] = ()

    def update(self, snapshot: Snapshot) -> None:
        """Write a progress object if one is due."""
        finished = snapshot.frames_total is not None and snapshot.frames_done >= snapshot.frames_total
        state = (snapshot.phase, snapshot.scene, snapshot.frames_done > 0, finished)
        now = self._clock()
        if state == self._seen and now < self._next_s:
            return
        self._seen, self._next_s = state, now + self._every_s
        self._write("progress", progress_fields(snapshot))

    def log(self, line: str, level: int = logging.INFO) -> None:
        """Write a log object."""
        self._write("log", {"level": logging.getLevelName(level).lower(), "message": line})

    def typing(self, typed: Typed) -> bool:
        """There is no input line."""
        return False

    def close(self, summary: Summary | None = None) -> None:
        """Write the summary object."""
        if summary:
            self._write("summary", asdict(summary))

    def _write(self, event: str, fields: Mapping[str, object]) -> None:
        head = {"schema": JSON_SCHEMA, "event": event, "t": round(self._clock() - self._start_s, 3)}
        self._stream.write(json.dumps({**head, **fields}) + "\n")
        self._stream.flush()


def progress_fields(snapshot: Snapshot) -> dict[str, object]:
    """The fields of a progress object."""
    fields = asdict(snapshot)
    del fields["at_s"]
    fields["stages"] = [{k: v for k, v in row.items() if k != "blocks"} for row in fields["stages"]]
    return {**fields, "eta_s": snapshot.eta_s}
