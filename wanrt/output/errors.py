"""System and FFmpeg errors as one-line OutputErrors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from wanrt.errors import OutputError

# what writing and encoding may raise; not every FFmpegError is an OSError (a missing GPU encoder is not)
MEDIA_ERRORS = (OSError, ValueError, RuntimeError, av.FFmpegError)

ADVICE = {
    errno.ENOSPC: "the disk is full; make space or choose another disk with -o",
    errno.EDQUOT: "the disk quota is used up; make space or choose another disk with -o",
    errno.EFBIG: "the file would be larger than this system or user may write (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another directory with -o",
    errno.EACCES: "no permission; choose another directory with -o",
    errno.EPERM: "no permission; choose another directory with -o",
    errno.ENOENT: "the directory is gone; was it removed while the video was written?",
    errno.EIO: "the disk reports an input/output error",
}


def words(error: BaseException) -> str:
    """One line: FFmpeg's last log line where PyAV carries one, else the system's words for the error."""
    last = getattr(error, "log", None)
    text = (last[2] if last else None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__


def describe(error: BaseException) -> str:
    """What to do about an error of the file system; `words` of any other."""
    return ADVICE.get(getattr(error, "errno", None) or 0, words(error))


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Turn the system's and FFmpeg's errors into OutputError about `path`."""
    try:
        yield
    except OutputError:
        raise
    except MEDIA_ERRORS as error:
        raise OutputError(f"{path}: {describe(error)}") from error


@contextmanager
def ffmpeg_reasons() -> Iterator[None]:
    """Let FFmpeg's own words into PyAV's errors ("Cannot load libcuda.so.1" for "Operation not permitted").

    PyAV keeps the last line of the log for that, but only while the log is on; nothing is printed meanwhile.
    """
    import av.logging

    before = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture():
            yield
    finally:
        av.logging.set_level(before)
