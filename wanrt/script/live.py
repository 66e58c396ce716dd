"""From a command line to a stream: its job, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wanrt.errors import UsageError
from wanrt.script import units
from wanrt.script.build import Script, build_job, read_script

if TYPE_CHECKING:
    from wanrt.pipeline.stream import StreamPlan
    from wanrt.script.job import RenderJob

PACES = ("repeat", "slow", "blend")
LOOPBACK = "127.0.0.1"
LIVE_SCHEMES = ("rtmp", "rtmps", "srt", "udp")
LATENCY_RANGE = (0.1, 60.0)  # seconds: less than a burst of frames cannot wait, more is no live stream


def plan_stream(
    prompt: str,
    flags: Mapping[str, Any],
    stdin: BinaryIO | None = None,
    *,
    rtmp: Sequence[str] = (),
    outputs: Sequence[str] = (),
    serve: str | None = None,
    latency: object = 2.0,
    pace: str = "repeat",
    watch: bool = False,
    endless: bool = False,
    name: str | None = None,
) -> tuple[RenderJob, StreamPlan]:
    """The job and the plan of `wanrt stream`. `flags`: as for `build_job`.

    Without a duration, in the flags or at the top of the file, a stream goes on with the last scene until it is
    stopped; so it does with `endless`. Raises `UsageError` (also `ScriptError`) for anything that is wrong.
    """
    from wanrt.pipeline.control import check_name, name_for
    from wanrt.pipeline.stream import StreamPlan

    if prompt.partition("://")[0].lower() in LIVE_SCHEMES:
        raise UsageError("got an address where the prompt belongs: wanrt stream PROMPT --rtmp URL")
    script = read_script(prompt, stdin)
    plan = StreamPlan(
        targets=(*(_rtmp(url) for url in rtmp), *outputs),
        pace=_checked("--pace", lambda value: units.choice(value, PACES, "a pace"), pace),
        latency=_checked("--latency", _latency, latency),
        serve=None if serve is None else _place(serve),
        name=name_for("stream" if script.bare else script.stem) if name is None else check_name(name),
        exact_name=name is not None,
        watch=_watched(prompt, flags, endless) if watch else None,
    )
    return stream_job(script, flags, endless=endless), plan


def stream_job(script: Script, flags: Mapping[str, Any], *, endless: bool = False) -> RenderJob:
    """The job of a stream: endless unless flags or file name a duration."""
    job = build_job(script, flags)
    timed = any(flags.get(key) is not None or key in script.source.data for key in ("duration", "chunks"))
    return replace(job, output=None, frames=job.frames if timed and not endless else None)


def _watched(prompt: str, flags: Mapping[str, Any], endless: bool) -> tuple[Path, Callable[[], RenderJob]]:
    path = Path(prompt)
    if not path.is_file():
        raise UsageError(f"--watch: {units.show(prompt)} is no file; give the prompt file to watch")
    return path, lambda: stream_job(read_script(prompt), flags, endless=endless)


def _rtmp(url: str) -> str:
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme not in ("rtmp", "rtmps"):
        got = f"scheme {units.show(scheme)}" if scheme else "no scheme"
        raise UsageError(f"--rtmp: got {got}, expected rtmp://HOST/APP/KEY; other targets go with --output")
    return url


def _place(text: str) -> tuple[str, int]:
    """Host and port of `--serve`: "8080", "0.0.0.0:8080"."""
    host, _, port = text.rpartition(":")
    return host or LOOPBACK, _checked("--serve", lambda value: units.whole(value, 0, 65_535, "a port"), port)


def _latency(value: object) -> float:
    low, high = LATENCY_RANGE
    seconds = float(units.duration(value))
    if not low <= seconds <= high:
        raise units.Expected(f"a time from {low:g}s to {high:g}s")
    return seconds


def _checked(name: str, read: Callable[[Any], Any], value: object) -> Any:
    try:
        return read(value)
    except units.Expected as bad:
        raise UsageError(f"{name}: got {units.show(value)}; expected {bad}") from None
