"""The line editor and the reader of keys: pure, so every way through them can be tried."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from wanrt.panel import Typed, layout
from wanrt.panel.editor import LONGEST, Key, LineEditor
from wanrt.panel.keys import PASTE_BEGIN, PASTE_END, KeyReader


def edit(*events):
    editor = LineEditor()
    lines = [line for event in events if (line := editor.feed(event)) is not None]
    return editor.text, editor.cursor, lines


@pytest.mark.parametrize(
    ("events", "text", "cursor"),
    [
        (["ab", Key.LEFT, "X"], "aXb", 2),
        (["ab", Key.HOME, "X", Key.END, "Y"], "XabY", 4),
        (["abc", Key.BACKSPACE], "ab", 2),
        (["abc", Key.HOME, Key.DELETE], "bc", 0),
        (["abc", Key.LEFT, Key.ERASE_BEFORE], "c", 0),
        (["abc", Key.LEFT, Key.ERASE_AFTER], "ab", 2),
        (["a red  ball ", Key.ERASE_WORD], "a red  ", 7),
        (["one", Key.ERASE_WORD], "", 0),
        (["abc", Key.ESCAPE], "", 0),
        (["e\u0301x", Key.LEFT, Key.BACKSPACE], "x", 0),
        (["\U0001f468\u200d\U0001f469", Key.LEFT], "\U0001f468\u200d\U0001f469", 0),
        (["a", Key.BACKSPACE, Key.BACKSPACE, Key.LEFT, Key.RIGHT, Key.DELETE], "", 0),
    ],
)
def test_editing(events, text, cursor):
    assert edit(*events) == (text, cursor, [])


def test_enter_gives_the_line_and_blank_ones_are_none():
    assert edit("  a ball ", Key.LEFT, Key.ENTER, "  ", Key.ENTER, Key.ENTER) == ("", 0, ["a ball"])


def test_pasted_lines_are_one_line_that_is_not_sent():
    assert edit("a\r\nb\nc\td\x1b[2Je\x03") == ("a b c d [2Je ", 13, [])


def test_history():
    editor = LineEditor()
    for event in ("one", Key.ENTER, "two", Key.ENTER, "two", Key.ENTER, "draft"):
        editor.feed(event)
    seen = []
    for key in (Key.UP, Key.UP, Key.UP, Key.DOWN, Key.DOWN, Key.DOWN):
        editor.feed(key)
        seen.append(editor.text)
    assert seen == ["two", "one", "one", "two", "draft", "draft"]
    editor.feed(Key.UP)
    editor.feed("!")
    assert editor.feed(Key.ENTER) == "two!"


def test_a_line_has_an_end():
    editor = LineEditor()
    editor.feed("x" * (LONGEST + 5))
    editor.feed("y")
    assert len(editor.text) == editor.cursor == LONGEST


EVENTS = st.lists(st.one_of(st.sampled_from(Key), st.text(max_size=8)), max_size=40)


@given(EVENTS)
def test_whatever_is_typed(events):
    """A naive oracle for the text; the cursor stays inside; nothing in it would move a terminal."""
    editor = LineEditor()
    for event in events:
        before, at = editor.text, editor.cursor
        line = editor.feed(event)
        if isinstance(event, str):
            assert editor.text == before[:at] + editor.text[at : editor.cursor] + before[at:]
        if event is Key.ENTER:
            assert line == (before.strip() or None)
        assert 0 <= editor.cursor <= len(editor.text)
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in editor.text)


@given(st.text(max_size=30), st.integers(0, 40), st.integers(15, 40))
def test_the_line_fits_with_its_cursor_in_view(text, steps, width):
    editor = LineEditor()
    for event in (text, *[Key.LEFT] * steps):
        editor.feed(event)
    view = layout.View(width, 24, typed=Typed(editor.text, editor.cursor))
    (line,) = layout._typed(view)
    assert cell_len(line.plain) <= view.inner
    assert [span for span in line.spans if span.style == "reverse"]


def read(*pieces):
    reader = KeyReader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    return events + reader.flush()


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"a ball\r", ["a ball", Key.ENTER]),
        ("\u65e5\u672c".encode(), ["\u65e5\u672c"]),
        (b"\x1b[A\x1b[B\x1bOC\x1bOD", [Key.UP, Key.DOWN, Key.RIGHT, Key.LEFT]),
        (b"\x1b[H\x1b[F\x1b[1~\x1b[4~\x1b[3~", [Key.HOME, Key.END, Key.HOME, Key.END, Key.DELETE]),
        (b"\x7f\x08\x15\x17", [Key.BACKSPACE, Key.BACKSPACE, Key.ERASE_BEFORE, Key.ERASE_WORD]),
        (b"\x1b", [Key.ESCAPE]),
        (b"\x1b\x1b[A", [Key.ESCAPE, Key.UP]),
        (b"\x1bx\x1b[15~\x1b[1;5C\x1b[[A\x00", []),
        (f"{PASTE_BEGIN}a\r\x1b[Ab{PASTE_END}\r".encode(), ["a\r\x1b[Ab", Key.ENTER]),
        (b"a\xffb", ["a\ufffdb"]),
        (b"\x1b[", []),
    ],
)
def test_keys(data, events):
    assert read(data) == events


@given(st.binary(max_size=40), st.data())
def test_pieces_mean_what_the_whole_means(noise, data):
    """However a terminal's bytes arrive, the edited line is the same."""
    text = f"a\u00e9\u65e5{PASTE_BEGIN}one\rtwo\x1b{PASTE_END}\x1b[D\x1b[3~z".encode()
    stream = noise.replace(b"\x1b", b"") + text
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert edit(*read(*pieces)) == edit(*read(stream))


@given(st.binary(max_size=60))
def test_any_bytes_are_read(data):
    reader = KeyReader()
    reader.feed(data)
    reader.flush()
