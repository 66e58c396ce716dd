"""`wanrt pause`: a running stream waits."""

from __future__ import annotations

from wanrt.cli import _options as option


def command(
    run: option.Run = None,
) -> None:
    """Pause a running stream: viewers see its last frame."""
    from wanrt.pipeline.control import ask, find_run

    ask(find_run(run), "pause")
