"""The last step of a file: remux, sync, rename; or, after a failure, keep the temporary under a name people
see."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from wanrt.errors import OutputError

from .errors import output_errors
from .remux import remux
from .target import Target, refuse_existing

log = logging.getLogger("wanrt.output")


def publish(target: Target, source: Path, tags: Mapping[str, str], fps: Fraction, *, force: bool) -> Path:
    """Turn the temporary fragmented MP4 into the finished file, atomically; the temporary goes last.

    Raises:
        OutputError: when there is no space or the rename fails; the temporary is still there then.
        UsageError: when the target has appeared meanwhile and `force` is not given.
    """
    ready = target.temporary(target.container)
    try:
        with output_errors(target.path):
            remux(source, ready, target.container, tags, fps)
        put_in_place(ready, target, force=force)
    except BaseException:
        ready.unlink(missing_ok=True)
        raise
    source.unlink(missing_ok=True)
    return target.path


def put_in_place(ready: Path, target: Target, *, force: bool) -> None:
    """Sync a complete file and give it its name.

    Raises:
        OutputError, UsageError: as `publish`.
    """
    with output_errors(target.path):
        sync(ready)
    if not force:
        refuse_existing(target)
    with output_errors(target.path):
        ready.replace(target.path)


def sync(path: Path) -> None:
    """Have the bytes of a file on the disk itself, so that a rename never outlives them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def keep_partial(target: Target, source: Path, *, empty: bool) -> Path | None:
    """Rename the temporary to a visible `STEM.partial.SUFFIX`; drop it when nothing is in it.

    Returns:
        Where it is now; None when there was nothing to keep.
    """
    if not source.exists():
        return None
    if empty:
        source.unlink(missing_ok=True)
        return None
    try:
        kept = target.partial(source.suffix.lstrip("."))
        source.rename(kept)
    except (OSError, OutputError) as error:
        log.warning("%s: kept under this name (%s)", source, error)
        return source
    return kept
