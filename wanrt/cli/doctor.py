"""`wanrt doctor`: what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    weights: Annotated[str | None, typer.Option(metavar="DIR", help="Look for weights here too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Examine this machine: devices, links, encoders, versions, weights; say what will work."""
    import json as encoding
    from pathlib import Path

    from wanrt.probes.doctor import as_json, examine, healthy, report

    checks = examine(Path(weights).expanduser() if weights else None)
    print(encoding.dumps(as_json(checks), indent=2) if json else report(checks))
    if not healthy(checks):
        raise typer.Exit(1)
