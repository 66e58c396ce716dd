"""`wanrt say`: a prompt for a running stream."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.cli import _options as option


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to show from now on.")],
    blend: Annotated[
        option.Text, typer.Option(metavar="TIME", help="How slowly, such as 2s; 0 is a cut.")
    ] = None,
    run: option.Run = None,
) -> None:
    """Tell a running stream what to show from now on."""
    from wanrt.pipeline.control import ask, find_run

    answer = ask(find_run(run), "say", prompt=prompt, **({} if blend is None else {"blend": blend}))
    print(f"from chunk {answer['chunk']}")
