"""`wanrt seed`: another seed for a running stream."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.cli import _options as option


def command(
    seed: Annotated[str, typer.Argument(metavar="N", help="0 to 2^63-1.")],
    run: option.Run = None,
) -> None:
    """Give a running stream another seed."""
    from wanrt.pipeline.control import ask, find_run

    print(f"from chunk {ask(find_run(run), 'seed', seed=seed)['chunk']}")
