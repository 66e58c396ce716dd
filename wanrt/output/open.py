"""From a file name to the sink that writes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from wanrt.errors import OutputError

from .metadata import as_tags
from .quality import Quality
from .queued import QueuedSink
from .sink import Sink
from .spec import VideoSpec
from .target import Target, check_target, report_leftovers

if TYPE_CHECKING:
    from .address import Address
    from .live import LiveOutput
    from .tee import TeeSink

Muxer = Literal["auto", "pyav", "ffmpeg"]

log = logging.getLogger("wanrt.output")


def open_sink(
    path: str | os.PathLike[str],
    spec: VideoSpec,
    *,
    codec: str | None = None,
    quality: Quality | float | str = 75,
    metadata: Mapping[str, object] | None = None,
    force: bool = False,
    threads: int = 0,
    muxer: Muxer = "auto",
) -> Sink:
    """Open the sink that a name asks for.

    Args:
        path: `.mp4 .mov .mkv .webm .gif`, `frame_%05d.png` or a directory ending in / (PNG frames).
        spec: size and rate.
        codec: h264, hevc, av1 or vp9; None for the container's own (h264, in WebM vp9).
        quality: 0 to 100, or "crf=N"; see `Quality`.
        metadata: prompt, seed, preset, version, title ...; `read_metadata` gives them back.
        force: replace what is there.
        threads: encoder threads, 0 for one per core (at most 8).
        muxer: "pyav", "ffmpeg" (imageio-ffmpeg's, through a pipe), or "auto": ffmpeg only for what PyAV's
            build lacks. GIF and PNG always go through PyAV.

    Raises:
        UsageError: the name, codec or quality is wrong, or the file exists and `force` is not given.
        OutputError: it cannot be written there, or nothing here encodes that codec.
    """
    target = check_target(path, force, codec)
    report_leftovers(target)  # here, not in check_target: a run checks its target again before it opens it
    tags, chosen = as_tags(metadata), Quality.parse(quality)
    if target.container == "png":
        from .images import PngSink

        return PngSink(target, spec, tags)
    if target.container == "gif":
        from .gif import GifSink

        return GifSink(target, spec, tags, force=force)
    return _open_movie(target, spec, chosen, tags, force, threads, muxer)


def open_outputs(
    targets: Sequence[str | os.PathLike[str]],
    spec: VideoSpec,
    *,
    pace: str = "repeat",
    latency: float = 2.0,
    bits: int | None = None,
    page: LiveOutput | None = None,
    **options: Any,
) -> TeeSink:
    """Open any number of outputs at once: files beside live addresses and HLS playlists.

    Every file has a queue and an encoder of its own; all live targets share one encoder and one schedule. None can
    harm another (`TeeSink`).

    Args:
        targets: what `open_sink` takes, and what `LiveSink` takes: URLs and names ending in .m3u8.
        spec: size and rate.
        pace: repeat, slow or blend; see `Pace`.
        latency: seconds; see `LiveSink`.
        bits: bits per second of the live streams; None for a rate that fits the size.
        page: a `PageServer` to show the stream at.
        options: of `open_sink`, for the files.

    Raises:
        UsageError, OutputError: as `open_sink` and `LiveSink`; files opened before are closed and removed.
    """
    from .live import LiveSink
    from .pacing import Pace
    from .tee import TeeSink

    live: list[str | Address | LiveOutput] = [os.fspath(target) for target in targets if is_live(target)]
    live += [page] if page else []
    files = [target for target in targets if not is_live(target)]
    sinks: list[Sink] = []
    try:
        sinks.extend(QueuedSink(open_sink(file, spec, **options)) for file in files)
        if live:
            sinks.append(LiveSink(live, spec, pace=Pace(pace), latency=latency, bits=bits))
        return TeeSink(sinks)
    except BaseException:
        for sink in sinks:
            sink.abort()
        raise


def is_live(target: str | os.PathLike[str]) -> bool:
    """Whether a target is an address or an HLS playlist rather than a file."""
    text = os.fspath(target)
    return "://" in text or text.endswith(".m3u8")


def _open_movie(
    target: Target,
    spec: VideoSpec,
    quality: Quality,
    tags: dict[str, str],
    force: bool,
    threads: int,
    muxer: Muxer,
) -> Sink:
    from .encoder import choose_encoder
    from .movie import MovieSink

    settings = choose_encoder(target.codec, spec, quality) if muxer != "ffmpeg" else None
    if settings is not None:
        return MovieSink(target, replace(settings, threads=threads, metadata=tags), tags, force=force)
    if muxer == "pyav":
        raise OutputError(f"{target.path}: no encoder for {target.codec} in PyAV's FFmpeg; try --codec h264")
    from .pipe import PipeSink, choose_pipe_encoder

    settings = choose_pipe_encoder(target.codec, spec, quality)
    return PipeSink(target, replace(settings, threads=threads, metadata=tags), tags, force=force)
