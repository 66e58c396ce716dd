"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from wanrt.errors import OutputError, UsageError


def check_measurement(path: Path, others: Collection[Path] = ()) -> None:
    """Refuse, before anything is made, a path that `write_json` could not write at the end.

    `others`: absolute paths that the same run writes. Raises `UsageError` with what to do instead.
    """
    target = path.absolute()
    if not target.parent.is_dir():
        raise UsageError(f"{path}: no directory {target.parent}; create it or choose another path")
    if target.is_dir():
        raise UsageError(f"{path}: is a directory, expected a file to write; name one in it")
    if target in others:
        raise UsageError(f"{path}: named twice for different outputs; choose another path")
    if _is_special(target):
        return
    trial = _beside(target)
    try:
        _create(trial)
        trial.unlink()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); choose a path in a writable directory"
        ) from error


def write_json(path: str | os.PathLike[str], document: object, *, indent: int | None = 2) -> Path:
    """Write `document` as JSON to a temporary file beside `path`, then rename it into place.

    A device or a pipe (`/dev/stderr`) is written to as it is. Raises `OutputError` when the place cannot be
    written; an existing file is then left as it was.
    """
    target = Path(path)
    part = target if _is_special(target) else _beside(target)
    try:
        if part is not target:
            _create(part)
        with part.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=indent, ensure_ascii=False)
            file.write("\n")
        if part is not target:
            part.replace(target)
    except BaseException as error:
        if part is not target:
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"cannot write {target}: {error.strerror}; give a path in a writable directory with space left"
            ) from error
        raise
    return target


def _is_special(path: Path) -> bool:
    """A device, pipe or socket: renaming a file over it would put it out of the world."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name[:120]}.{secrets.token_hex(4)}.part")


def _create(path: Path) -> None:
    """An empty new file with the permissions that the user's umask leaves."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
