"""What the probes' reports on the terminal share."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wanrt.probes.vae_partial import Verdict

COLOURS = {Verdict.YES: "green", Verdict.CONDITIONAL: "yellow", Verdict.NO: "red"}


def verdicts(rows: Iterable[tuple[str, Verdict | None, str]]) -> Table:
    """Question, verdict and answer, one line each."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for question, verdict, answer in rows:
        mark = Text(verdict or "-", style=f"bold {COLOURS[verdict]}" if verdict else "dim")
        table.add_row(Text(question, style="bold"), mark, Text(answer))
    return table


def titled(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def console() -> Console:
    """Standard output; tables keep their width in a pipe, where nobody can widen the window."""
    return Console(width=None if sys.stdout.isatty() else 140)
