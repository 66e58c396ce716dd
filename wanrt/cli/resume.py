"""`wanrt resume`: a paused stream goes on."""

from __future__ import annotations

from wanrt.cli import _options as option


def command(
    run: option.Run = None,
) -> None:
    """Let a paused stream go on."""
    from wanrt.pipeline.control import ask, find_run

    ask(find_run(run), "resume")
