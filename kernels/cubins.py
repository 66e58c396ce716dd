"""Machine code kept on disk: what one process has compiled, the next one reads.

A process that runs Krea 14B compiles some ten kernels before its first frame, which takes it 1.1 s (16 cores beside an
H100), more where others want the cores; so does each of its ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path

import platformdirs

from wanrt_kernels import nvrtc

log = logging.getLogger("wanrt.kernels")

SWITCH = "WANRT_KERNEL_CACHE"  # another folder; empty: nothing is kept
DIGEST_BYTES = 32  # in front of each file's code: a file that was cut off or changed is compiled anew


def folder() -> Path | None:
    """Where compiled kernels are kept; None: nowhere."""
    chosen = os.environ.get(SWITCH)
    if chosen is None:
        return Path(platformdirs.user_cache_dir("wanrt", appauthor=False)) / "kernels"
    return Path(chosen).expanduser() if chosen else None


def cubin(source: str, architecture: str) -> bytes:
    """As `nvrtc.compile_cubin`, which is asked for what is not kept yet.

    What cannot be kept is a line in the log. Raises `NvrtcError` as it does.
    """
    kept = folder()
    if kept is None:
        return nvrtc.compile_cubin(source, architecture)
    path = kept / f"{_key(source, architecture)}.cubin"
    code = _read(path)
    if code is None:
        code = nvrtc.compile_cubin(source, architecture)
        _keep(path, code)
    return code


def _key(source: str, architecture: str) -> str:
    """Of all that the code depends on: files of other versions are never asked for again."""
    about = "\0".join((nvrtc.version(), architecture, *nvrtc.OPTIONS, source))
    return hashlib.sha256(about.encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    log.warning("%s is damaged: compiled anew", path)
    return None


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all: another process may write the same file, or read it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError as error:
        log.info("compiled kernels are not kept: %s; set %s to a folder that can be written", error, SWITCH)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
