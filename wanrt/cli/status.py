"""`wanrt status`: how a running stream is doing."""

from __future__ import annotations

from wanrt.cli import _options as option


def command(run: option.Run = None) -> None:
    """Show how a running stream is doing, as JSON."""
    import json

    from wanrt.pipeline.control import ask, find_run

    print(json.dumps(ask(find_run(run), "status"), indent=2, ensure_ascii=False))
