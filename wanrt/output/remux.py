"""From the growing fragmented MP4 to the finished file: the same packets in their final container."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av

FORMATS = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "webm": "webm"}
MUXER_OPTIONS = {"mp4": {"movflags": "faststart"}, "mov": {"movflags": "faststart"}}


def remux(source: Path, target: Path, container: str, tags: Mapping[str, str], fps: Fraction) -> int:
    """Copy the video packets of `source` into a new file, without encoding again.

    Returns:
        Frames copied.

    Raises:
        OSError, ValueError: from FFmpeg (PyAV's own errors are both).
    """
    options = MUXER_OPTIONS.get(container, {})
    frames = 0
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", format=FORMATS[container], options=options) as made,
    ):
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream, opaque=True)
        copy.time_base = stream.time_base
        if container in ("mp4", "mov") and stream.codec_context.name == "hevc":
            copy.codec_context.codec_tag = "hvc1"  # QuickTime and Safari play no hev1
        made.metadata.update(tags)
        for packet in given.demux(stream):
            if packet.dts is None:
                continue
            packet.stream = copy
            made.mux(packet)
            frames += 1
    return frames
