"""`wanrt presets`: the models and demos that come with wanrt."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.cli._talk import preset_words


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A preset, or a preset's .toml file.", autocompletion=preset_words
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the models and demos that come with wanrt, or show one."""
    from wanrt.script.describe import describe, listing

    print(listing(as_json=json) if name is None else describe(name, as_json=json))
