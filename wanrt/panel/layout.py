"""A snapshot as lines of text for a given width and height. Pure: no terminal, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from wanrt.panel import bars, words
from wanrt.panel.bars import Glyphs
from wanrt.panel.editor import next_stop, previous_stop
from wanrt.panel.snapshot import LoadStep, Memory, Phase, Snapshot, StageRow, Typed

# The terminal's own sixteen colours: its user chose them to be readable on its background.
ACCENT, GOOD, WARN, BAD, DIM = "cyan", "green", "yellow", "red", "bright_black"
STAGE_COLOURS = {"mesh": ACCENT, "stage0": "magenta", "text": "yellow", "encoder": "blue"}
MARGIN = 1
GAP = "  "


@dataclass(frozen=True, slots=True)
class Section:
    """Lines that come and go together; the section of the lowest rank goes first when the screen is low."""

    rank: int
    lines: Sequence[Text]


@dataclass(frozen=True, slots=True)
class View:
    """What a paint depends on besides the snapshot: room, glyphs, seconds since the snapshot, the input line."""

    width: int
    height: int
    glyphs: Glyphs = bars.UNICODE
    age: float = 0.0
    typed: Typed | None = None

    @property
    def inner(self) -> int:
        """Characters between the margins; the last column stays free, so that no terminal wraps."""
        return max(10, self.width - 2 * MARGIN - 1)


def lines(snapshot: Snapshot, view: View) -> list[Text]:
    """The panel: at most `view.height - 1` lines, each at most `view.width - 1` cells wide."""
    sections = _loading(snapshot, view) if snapshot.phase is Phase.LOADING else _running(snapshot, view)
    return [_margin(line, view) for line in _fit(sections, max(1, view.height - 1))]


def _fit(sections: Sequence[Section], room: int) -> list[Text]:
    """Sections in order, the least important left out until the rest has room; blank lines go before any of
    them.
    """
    chosen = [s for s in sections if s.lines]
    while len(chosen) > 1 and sum(len(s.lines) for s in chosen) > room:
        chosen.remove(min(chosen, key=lambda s: s.rank))
    return [line for section in chosen for line in section.lines][:room]


def _margin(line: Text, view: View) -> Text:
    if not line:
        return line
    whole = Text(" " * MARGIN, no_wrap=True, end="")
    whole.append_text(line)
    whole.truncate(view.width - 1, overflow="crop")
    return whole


def clip(text: str, width: int, glyphs: Glyphs) -> str:
    """`text` in at most `width` cells, with an ellipsis where it was cut."""
    if width <= 0:
        return ""
    if cell_len(text) <= width:
        return text
    mark = glyphs.ellipsis if cell_len(glyphs.ellipsis) < width else ""
    return set_cell_size(text, width - cell_len(mark)).rstrip() + mark


def _split(left: Text, right: Text, width: int) -> Text:
    """`left` and `right` at the two ends of a line; `right` is dropped when it does not fit."""
    space = width - left.cell_len - right.cell_len
    return left if space < 2 else Text.assemble(left, " " * space, right)


def _join(parts: Sequence[Text], width: int, gap: str = GAP) -> Text:
    """As many of `parts` as fit, in order of importance."""
    line = Text()
    for part in parts:
        piece = Text.assemble(gap, part) if line.cell_len else part
        if line.cell_len + piece.cell_len <= width:
            line.append_text(piece)
    return line


def _flow(parts: Sequence[Text], view: View, rank: int, gap: str = "   ") -> list[Section]:
    """`parts` on one line, and what does not fit on a second one that is the first of the two to go."""
    rows, width = [Text()], view.inner
    for part in parts:
        if rows[-1].cell_len and rows[-1].cell_len + len(gap) + part.cell_len > width:
            rows.append(Text())
        rows[-1].append_text(Text.assemble(gap, part) if rows[-1].cell_len else part)
    return [Section(rank - 30 * i, [row]) for i, row in enumerate(rows[:2]) if row.cell_len]


def _running(snapshot: Snapshot, view: View) -> list[Section]:
    blank = [Text()]
    return [
        Section(9, blank),
        Section(60, [_heading(snapshot, view)]),
        Section(100, [_progress(snapshot, view)]),
        *_flow(_rates(snapshot, view), view, rank=90),
        Section(10, blank),
        Section(80, _stages(snapshot, view)),
        Section(20, _axis(snapshot, view)),
        Section(11, blank),
        Section(70, _prompt(snapshot, view)),
        *_flow(_resources(snapshot, view), view, rank=50),
        Section(65, _targets(snapshot, view)),
        Section(75, _warnings(snapshot, view)),
        Section(95, _typed(view)),
    ]


def _heading(snapshot: Snapshot, view: View) -> Text:
    subtitle = Text(words.one_line(snapshot.subtitle), DIM)
    room = view.inner - (subtitle.cell_len + 2 if subtitle.cell_len < view.inner // 2 else 0)
    title = words.one_line(snapshot.title or snapshot.output)
    return _split(Text(clip(title, room, view.glyphs), "bold"), subtitle, view.inner)


def _progress(snapshot: Snapshot, view: View) -> Text:
    if snapshot.frames_total is None:
        return _endless(snapshot, view)
    share = snapshot.frames_done / snapshot.frames_total if snapshot.frames_total else 1.0
    digits = len(str(snapshot.frames_total))
    eta = snapshot.eta_s
    left = None if eta is None else max(0.0, eta - view.age)
    ending = "finishing" if snapshot.phase is Phase.FINISHING else f"{words.clock_time(left)} left"
    facts = [
        Text(f"{words.percent(share):>5}", "bold"),
        Text(f"{snapshot.frames_done:>{digits}}/{snapshot.frames_total} frames"),
        Text(f"{ending:>9}", DIM),
    ]
    tail = _join(facts, view.inner - 12)
    width = view.inner - tail.cell_len - 2
    done, rest = bars.progress(share, width, view.glyphs)
    return Text.assemble((done, ACCENT), (rest, DIM), GAP, tail)


def _endless(snapshot: Snapshot, view: View) -> Text:
    made = snapshot.frames_done / snapshot.fps_target if snapshot.fps_target else None
    parts = [
        Text(f"{snapshot.frames_done} frames", "bold"),
        Text(f"{words.clock_time(made)} of video"),
        Text("paused", WARN) if snapshot.paused else Text("until stopped", DIM),
    ]
    return _join(parts, view.inner)


def _rates(snapshot: Snapshot, view: View) -> list[Text]:
    fps = Text.assemble((f"{words.rate(snapshot.fps_now)} fps", "bold"))
    parts = [fps, Text(f"mean {words.rate(snapshot.fps_mean)}")]
    speed = snapshot.fps_now or snapshot.fps_mean
    if speed and snapshot.fps_target:
        times = speed / snapshot.fps_target
        parts.append(Text(f"{times:.2f}x real time", GOOD if times >= 1 else WARN))
    parts.append(_fact("first frame", words.seconds(snapshot.time_to_first_frame_s)))
    parts.append(_fact("elapsed", words.clock_time(snapshot.elapsed_s + view.age)))
    return parts


def _fact(name: str, value: str) -> Text:
    return Text.assemble((name + " ", DIM), value)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Widths of a stage row; 0: not shown."""

    name: int
    bar: int
    bubble: int
    last: int

    @classmethod
    def of(cls, stages: Sequence[StageRow], inner: int) -> _Columns:
        """Columns for `inner` characters: the bar takes what is left, and the words go before it gets
        short.
        """
        name = min(max(cell_len(s.name) for s in stages), inner // 4)
        bubble = 17 if inner >= 64 and any(s.bubble_ms is not None for s in stages) else 0
        last = 16 if inner >= 90 else 0
        return cls(name, inner - name - 2 - 7 - bubble - last, bubble, last)


def _stages(snapshot: Snapshot, view: View) -> list[Text]:
    if not snapshot.stages:
        return []
    columns = _Columns.of(snapshot.stages, view.inner)
    window = bars.nice_window(snapshot.period_s)
    shift = snapshot.delay_s - view.age
    return [_stage(row, columns, window, shift, view) for row in snapshot.stages]


def _stage(row: StageRow, columns: _Columns, window: float, shift: float, view: View) -> Text:
    colour = next((c for key, c in STAGE_COLOURS.items() if row.name.replace(" ", "").startswith(key)), GOOD)
    line = Text(set_cell_size(clip(row.name, columns.name, view.glyphs), columns.name) + GAP)
    styles = {"idle": DIM, "busy": colour, "reversed": f"{colour} reverse"}
    shifted = [(a + shift, b + shift if b < 0 else 0.0) for a, b in row.blocks]
    for kind, text in bars.runs(bars.coverage(shifted, window, columns.bar), view.glyphs):
        line.append(text, styles[kind])
    line.append(f"{GAP}{words.percent(row.busy_share):>5}")
    if columns.bubble:
        bubble = "" if row.bubble_ms is None else f"bubble {words.milliseconds(row.bubble_ms):>7}"
        line.append(f"{GAP} {bubble:<14}", DIM)
    if columns.last:
        line.append(GAP + clip(words.one_line(row.last), columns.last - 2, view.glyphs), DIM)
    return line


def _axis(snapshot: Snapshot, view: View) -> list[Text]:
    """What the moving bars' ends mean."""
    if not snapshot.stages:
        return []
    columns = _Columns.of(snapshot.stages, view.inner)
    left = f"{bars.nice_window(snapshot.period_s) + snapshot.delay_s:.2g} s ago"
    right = f"{snapshot.delay_s:.1g} s ago" if snapshot.delay_s else "now"
    space = columns.bar - len(left) - len(right)
    if space < 1:
        return []
    axis = " " * (columns.name + 2) + left + " " * space + right
    if columns.bubble and snapshot.period_s:
        axis += f"{GAP}{'':>5}{GAP} period {words.milliseconds(snapshot.period_s * 1000):>7}"
    return [Text(axis, DIM)]


def _prompt(snapshot: Snapshot, view: View) -> list[Text]:
    if not snapshot.prompt:
        return []
    label = "prompt"
    if snapshot.scene is not None:
        label = f"scene {snapshot.scene}" + (f"/{snapshot.scenes}" if snapshot.scenes else "")
    label += GAP
    prompt = words.one_line(snapshot.prompt)
    if snapshot.blend is None or not snapshot.blend_from:
        return [Text.assemble((label, DIM), clip(prompt, view.inner - len(label), view.glyphs))]
    middle = f" {view.glyphs.arrow} {words.percent(snapshot.blend)} {view.glyphs.arrow} "
    room = view.inner - len(label) - len(middle)
    old = clip(words.one_line(snapshot.blend_from), room // 2, view.glyphs)
    new = clip(prompt, room - cell_len(old), view.glyphs)
    return [Text.assemble((label, DIM), (old, DIM), (middle, ACCENT), new)]


def _resources(snapshot: Snapshot, view: View) -> list[Text]:
    parts = [_queue(q.name, q.depth, q.capacity, view.glyphs) for q in snapshot.queues]
    if snapshot.encoder_lag_s is not None:
        late = WARN if snapshot.encoder_lag_s > 1 else ""
        parts.append(Text.assemble(("encoder lag ", DIM), (words.seconds(snapshot.encoder_lag_s), late)))
    parts += _live(snapshot)
    if snapshot.memory:
        parts.append(_memory(snapshot.memory))
    return parts


def _live(snapshot: Snapshot) -> list[Text]:
    """What a stream adds: how soon prompts are seen, what viewers saw twice or late."""
    if snapshot.live is None:
        return []
    live, parts = snapshot.live, []
    if snapshot.prompt_to_pixel_s is not None:
        parts.append(_fact("prompt to pixel", words.seconds(snapshot.prompt_to_pixel_s)))
    parts.append(_fact("at hand", words.seconds(live.waiting_s)))
    parts.append(_fact("repeated", str(live.repeated)))
    parts.append(Text.assemble(("late ", DIM), (str(live.late), WARN if live.late else "")))
    return parts


TARGET_COLOURS = {"live": GOOD, "connecting": WARN, "waiting": WARN, "failed": BAD}


def _targets(snapshot: Snapshot, view: View) -> list[Text]:
    """A line for each live target."""
    targets = snapshot.live.targets if snapshot.live else ()
    name = max((cell_len(target.name) for target in targets), default=0)
    lines = []
    for target in targets:
        facts = [Text(target.phase, TARGET_COLOURS.get(target.phase, DIM)), _fact("sent", str(target.sent))]
        if target.dropped:
            facts.append(Text.assemble(("dropped ", DIM), (str(target.dropped), WARN)))
        if target.connections > 1:
            facts.append(_fact("connections", str(target.connections)))
        if target.error and target.phase != "live":
            facts.append(Text(words.one_line(target.error.removeprefix(f"{target.name}: ")), DIM))
        label = set_cell_size(clip(target.name, view.inner // 2, view.glyphs), min(name, view.inner // 2))
        lines.append(Text.assemble(label, GAP, _join(facts, view.inner - cell_len(label) - 2)))
    return lines


HINT = "type a prompt, Enter shows it; /blend 2s PROMPT, /seed 7, /set bias=0.3, /pause, /resume, /stop"


def _typed(view: View) -> list[Text]:
    """The input line with its cursor in view; while it is empty, the last answer or what can be typed."""
    if view.typed is None:
        return []
    mark, typed, room = "> ", view.typed, view.inner - 2
    if not typed.text:
        said = words.one_line(typed.answer) or HINT
        style = BAD if typed.refused else GOOD if typed.answer else DIM
        rest = Text(clip(said, room - 2, view.glyphs), style)
        return [Text.assemble((mark, ACCENT), (" ", "reverse"), " ", rest)]
    before, at, after = _around(words.visible(typed.text), typed.cursor, room)
    return [Text.assemble((mark, ACCENT), before, (at, "reverse"), after)]


def _around(text: str, cursor: int, room: int) -> tuple[str, str, str]:
    """As much of `text` as fits in `room` cells with the cursor in it: before the cursor, under it, after it.

    Under the cursor is what one step to the right passes: a letter with its accents, a wide character; a space at
    the end.
    """
    end = next_stop(text, cursor)
    at = text[cursor:end] or " "
    start, left = cursor, room - cell_len(at)
    ahead = min(cell_len(text[end:]), room // 4)  # what comes next stays in view, too
    while start and cell_len(text[previous_stop(text, start) : cursor]) <= left - ahead:
        start = previous_stop(text, start)
    stop, left = end, left - cell_len(text[start:cursor])
    while stop < len(text) and cell_len(text[end : next_stop(text, stop)]) <= left:
        stop = next_stop(text, stop)
    return text[start:cursor], at, text[end:stop]


def _memory(memory: Memory) -> Text:
    line = _fact("memory", words.size(memory.rss))
    if memory.device_used is not None:
        line.append_text(_fact("   GPU", words.of_size(memory.device_used, memory.device_total)))
    return line


def _queue(name: str, depth: int, capacity: int, glyphs: Glyphs) -> Text:
    style = WARN if depth >= capacity else ""
    if capacity > 8:
        return Text.assemble((f"{name} ", DIM), (f"{depth}/{capacity}", style))
    meter = glyphs.full * min(depth, capacity), glyphs.empty * max(0, capacity - depth)
    return Text.assemble((f"{name} ", DIM), (meter[0], style), (meter[1], DIM))


def _warnings(snapshot: Snapshot, view: View) -> list[Text]:
    mark = view.glyphs.warning + " "
    room = view.inner - len(mark)
    return [Text(mark + clip(words.one_line(w), room, view.glyphs), WARN) for w in snapshot.warnings[-2:]]


def _loading(snapshot: Snapshot, view: View) -> list[Section]:
    name = max((cell_len(step.name) for step in snapshot.load), default=0)
    elapsed = snapshot.elapsed_s + view.age
    rows = [_load(step, min(name, view.inner // 3), elapsed, view) for step in snapshot.load]
    room = max(1, view.height - 2)
    active = next((i for i, s in enumerate(snapshot.load) if s.state == "active"), len(rows))
    first = max(0, min(active - room // 2, len(rows) - room))
    return [
        Section(9, [Text()]),
        Section(60, [_heading(snapshot, view)]),
        Section(10, [Text()]),
        Section(80, rows[first : first + room]),
        Section(75, _warnings(snapshot, view)),
        Section(95, _typed(view)),
    ]


def _load(step: LoadStep, name: int, elapsed: float, view: View) -> Text:
    glyphs = view.glyphs
    spinner = glyphs.spinner[int(elapsed * 10) % len(glyphs.spinner)]
    mark, style = {
        "done": (glyphs.done, GOOD),
        "active": (spinner, ACCENT),
        "failed": (glyphs.failed, BAD),
        "waiting": (glyphs.waiting, DIM),
    }[step.state]
    label = set_cell_size(clip(step.name, name, glyphs), name)
    line = Text.assemble((mark + " ", style), (label, DIM if step.state == "waiting" else ""))
    parts: list[Text] = []
    if step.state == "active" and step.fraction is not None:
        width = min(30, view.inner - name - 24)
        done, rest = bars.progress(step.fraction, max(4, width), glyphs)
        parts.append(Text.assemble((done, ACCENT), (rest, DIM), f" {words.percent(step.fraction):>5}"))
    if step.detail:
        parts.append(Text(words.one_line(step.detail), DIM))
    if step.seconds is not None and step.state != "waiting":
        ticking = view.age if step.state == "active" else 0.0
        parts.append(Text(words.seconds(step.seconds + ticking), DIM))
    room = view.inner - line.cell_len - 2
    return Text.assemble(line, GAP, _join(parts, room)) if parts and room > 4 else line
