"""`wanrt set`: other settings for a running stream."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.cli import _options as option


def command(
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="bias=0.3 steps=4")],
    run: option.Run = None,
) -> None:
    """Change the bias or the steps of a running stream."""
    from wanrt.pipeline.control import ask, find_run, read_settings

    given = read_settings(settings)
    print(f"from chunk {ask(find_run(run), 'set', **given)['chunk']}")
