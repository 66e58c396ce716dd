"""What a file says about its own making: prompt, seed, preset, version."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from wanrt.errors import UsageError


def as_tags(metadata: Mapping[str, object] | None) -> dict[str, str]:
    """Tags that every container keeps: title and description for people, all keys as JSON in `comment`.

    MP4's own fields know neither seeds nor presets; one JSON object in the comment survives every container
    alike.
    """
    if not metadata:
        return {}
    tags = {"comment": json.dumps({key: str(value) for key, value in metadata.items()}, ensure_ascii=False)}
    if "title" in metadata:
        tags["title"] = str(metadata["title"])
    if "prompt" in metadata:
        tags["description"] = str(metadata["prompt"])
    return tags


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata that a file of `open_sink` was written with; empty for a file that carries none.

    Raises:
        UsageError: when the file cannot be read.
    """
    import av

    try:
        with av.open(os.fspath(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a video that can be read ({error})") from error
    try:
        found = json.loads(tags.get("comment", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
