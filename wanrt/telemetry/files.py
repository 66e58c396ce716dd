"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from wanrt.errors import OutputError


def write_json(path: str | os.PathLike[str], document: object, *, indent: int | None = 2) -> Path:
    """Write `document` as JSON to a temporary file beside `path`, then rename it into place.

    Raises `OutputError` when the place cannot be written; an existing file is then left as it was.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror}; give a path in a writable directory"
        ) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=indent, ensure_ascii=False)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot write {target}: {error.strerror}; free space or choose another path"
            ) from error
        raise
    return target
