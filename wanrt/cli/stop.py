"""`wanrt stop`: a running stream ends."""

from __future__ import annotations

from wanrt.cli import _options as option


def command(
    run: option.Run = None,
) -> None:
    """End a running stream; its recordings are finished."""
    from wanrt.pipeline.control import ask, find_run

    ask(find_run(run), "stop")
