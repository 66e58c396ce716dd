"""Which encoder makes a codec here, with which options, and the encoder itself: NV12 frames in, packets out.

Every encoder runs without look-ahead or reordering: a frame that went in comes out at once, so that whatever
was written is in the file at the next chunk boundary, and a live stream waits for nothing. That costs some
compression (no B-frames) and buys that a killed run loses nothing.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import av
import numpy as np

from wanrt.errors import OutputError

from .errors import MEDIA_ERRORS, ffmpeg_reasons, words
from .quality import Quality
from .spec import VideoSpec

if TYPE_CHECKING:
    from av import Packet
    from av.video.stream import VideoStream

log = logging.getLogger("wanrt.output")

KEYFRAME_SECONDS = 4  # a player seeks to within this; a live stream asks for 2
MAX_THREADS = 8  # slices cost bits; eight encode 832x480 faster than any model makes it

# ITU-T H.273 code points (primaries, transfer, matrix 1 = BT.709); AVColorRange 1 = limited
BT709 = 1
LIMITED_RANGE = 1


@dataclass(frozen=True)
class EncoderKind:
    """One encoder of FFmpeg and how wanrt sets it.

    Attributes:
        name: FFmpeg's name.
        pixel_format: what it takes; the NV12 planes are split for "yuv420p".
        options: FFmpeg options given the CRF.
        hardware: needs a device, hence a trial encode before it is believed.
        tag: four characters in MP4 and MOV where the muxer's default is not what players expect.
    """

    name: str
    pixel_format: str
    options: Callable[[float], dict[str, str]]
    hardware: bool = False
    tag: str | None = None


def _nvenc(crf: float) -> dict[str, str]:
    # delay 0 and no B-frames: a packet per frame. NVENC's `cq` is the constant quality of its VBR mode on
    # the CRF scale.
    return {"preset": "p5", "tune": "ll", "rc": "vbr", "cq": f"{crf:g}", "b": "0", "bf": "0", "delay": "0"}


def _x264(crf: float) -> dict[str, str]:
    # without look-ahead slower presets buy nothing: "medium" takes 4 times as long as "veryfast" for the
    # same bytes
    return {"preset": "veryfast", "tune": "zerolatency", "crf": f"{crf:g}"}


def _x265(crf: float) -> dict[str, str]:
    return {"preset": "fast", "tune": "zerolatency", "crf": f"{crf:g}", "x265-params": "log-level=error"}


def _svtav1(crf: float) -> dict[str, str]:
    return {"preset": "8", "crf": f"{round(crf)}", "svtav1-params": "pred-struct=1"}  # 1 = low delay


def _vp9(crf: float) -> dict[str, str]:
    fast = {"deadline": "realtime", "cpu-used": "5", "row-mt": "1", "lag-in-frames": "0"}
    return {"crf": f"{round(crf)}", "b": "0", **fast}


def _nvenc_live(bits: int) -> dict[str, str]:
    rate = {"rc": "cbr", "b": str(bits), "maxrate": str(bits), "bufsize": str(bits)}
    latency = {"tune": "ll", "bf": "0", "delay": "0", "zerolatency": "1"}
    return {"preset": "p5", "profile": "high", "forced-idr": "1", "no-scenecut": "1"} | rate | latency


def _x264_live(bits: int) -> dict[str, str]:
    # a VBV of one second, filled up to the full rate (nal-hrd), keyframes at their distance and on demand
    # only
    rate = {"b": str(bits), "minrate": str(bits), "maxrate": str(bits), "bufsize": str(bits)}
    params = "nal-hrd=cbr:scenecut=0:open-gop=0"
    return {"preset": "veryfast", "tune": "zerolatency", "profile": "high", "x264-params": params} | rate


LIVE_OPTIONS: dict[str, Callable[[int], dict[str, str]]] = {"h264_nvenc": _nvenc_live, "libx264": _x264_live}
LIVE_KEYFRAME_SECONDS = 2  # what services ask for

# codec -> encoders, the preferred first
ENCODERS: dict[str, tuple[EncoderKind, ...]] = {
    "h264": (
        EncoderKind("h264_nvenc", "nv12", _nvenc, hardware=True),
        EncoderKind("libx264", "nv12", _x264),
    ),
    "hevc": (
        EncoderKind("hevc_nvenc", "nv12", _nvenc, hardware=True, tag="hvc1"),
        EncoderKind("libx265", "yuv420p", _x265, tag="hvc1"),
    ),
    "av1": (
        EncoderKind("av1_nvenc", "nv12", _nvenc, hardware=True),
        EncoderKind("libsvtav1", "yuv420p", _svtav1),
    ),
    "vp9": (EncoderKind("libvpx-vp9", "yuv420p", _vp9),),
}


@dataclass(frozen=True)
class EncoderSettings:
    """Everything an encoder is opened with.

    Attributes:
        kind: which encoder.
        spec: size and rate.
        options: FFmpeg options of the encoder.
        keyframe_seconds: longest distance of two keyframes.
        threads: encoder threads; 0 means one per core, at most `MAX_THREADS`.
        metadata: tags of the file.
    """

    kind: EncoderKind
    spec: VideoSpec
    options: dict[str, str]
    keyframe_seconds: float = KEYFRAME_SECONDS
    threads: int = 0
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def gop(self) -> int:
        """Frames from keyframe to keyframe."""
        return max(1, round(self.spec.fps * self.keyframe_seconds))

    @property
    def thread_count(self) -> int:
        """Threads, counted out."""
        return self.threads or min(MAX_THREADS, os.cpu_count() or 1)


class VideoEncoder:
    """An open encoder and the fragmented-MP4 header of its stream.

    Call order: `encode` for each frame, `drain` once, `close`. Timestamps are frame numbers in
    units of 1 / fps.

    Raises:
        OutputError: when FFmpeg cannot open the encoder.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self.frames = 0
        self.drained = False
        self._header = io.BytesIO()
        if settings.kind.name == "libsvtav1":
            # errors only: the library has no other way to keep its banner off stderr
            os.environ.setdefault("SVT_LOG", "1")
        try:
            self._container = av.open(
                self._header, "w", format="mp4", options={"movflags": "empty_moov+default_base_moof"}
            )
            self.stream = self._open_stream()
        except MEDIA_ERRORS as error:
            raise OutputError(f"encoder {settings.kind.name}: cannot be opened ({words(error)})") from error

    def _open_stream(self) -> VideoStream:
        settings, spec = self.settings, self.settings.spec
        options = settings.options | {"threads": str(settings.thread_count)}
        stream = self._container.add_stream(settings.kind.name, rate=spec.fps, options=options)
        if not isinstance(stream, av.VideoStream):
            raise OutputError(f"encoder {settings.kind.name}: encodes {stream.type}, expected video")
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = spec.width, spec.height, settings.kind.pixel_format
        context.time_base = stream.time_base = spec.time_base
        context.gop_size = settings.gop
        context.color_range = LIMITED_RANGE
        context.color_primaries = context.color_trc = context.colorspace = BT709
        if settings.kind.tag:
            context.codec_tag = settings.kind.tag
        self._container.metadata.update(settings.metadata)
        self._container.start_encoding()
        return stream

    @property
    def header(self) -> bytes:
        """ftyp and moov of a fragmented MP4 with this stream."""
        return self._header.getvalue()

    def encode(self, planes: np.ndarray, *, keyframe: bool = False) -> list[Packet]:
        """One frame, uint8 NV12 [H * 3 // 2, W], to its packets (one, unless the encoder holds it back)."""
        frame = av.VideoFrame.from_ndarray(self._arrange(planes), format=self.settings.kind.pixel_format)
        frame.pts, frame.time_base = self.frames, self.settings.spec.time_base
        if keyframe:
            frame.pict_type = av.video.frame.PictureType.I
        self.frames += 1
        return self._timed(self.stream.codec_context.encode(frame))

    def drain(self) -> list[Packet]:
        """The packets that the encoder still holds; it takes no frame after this."""
        self.drained = True
        return self._timed(self.stream.codec_context.encode(None))

    def close(self) -> None:
        """Let go of the encoder, drained or not; its header stays. Nothing may use `stream` afterwards."""
        self.drained = True
        self._header = io.BytesIO(self.header)  # the muxer ends its own copy
        self._container.close()

    def _timed(self, packets: Iterable[Packet]) -> list[Packet]:
        """Give each packet its duration, so that the last frame lasts as long as the others."""
        packets = list(packets)
        for packet in packets:
            packet.duration = 1
        return packets

    def _arrange(self, planes: np.ndarray) -> np.ndarray:
        if self.settings.kind.pixel_format == "nv12":
            return np.ascontiguousarray(planes)
        height = planes.shape[0] * 2 // 3
        luma, chroma = planes[:height], planes[height:]
        flat = (luma.reshape(-1), chroma[:, 0::2].reshape(-1), chroma[:, 1::2].reshape(-1))
        return np.concatenate(flat).reshape(planes.shape)


def choose_encoder(
    codec: str,
    spec: VideoSpec,
    quality: Quality,
    *,
    kinds: Sequence[EncoderKind] | None = None,
    trial: Callable[[EncoderSettings], str | None] | None = None,
) -> EncoderSettings | None:
    """The first encoder of a codec that works here; a log line says which, and why not the ones before.

    Args:
        codec: key of `ENCODERS`.
        spec: size and rate; a hardware encoder is tried at this very size.
        quality: becomes the encoder's CRF.
        kinds: candidates instead of `ENCODERS[codec]`.
        trial: instead of `trial_encode`.

    Returns:
        None when PyAV's FFmpeg has no encoder for the codec.
    """
    crf = quality.crf(codec)
    wanted = [EncoderSettings(kind, spec, kind.options(crf)) for kind in kinds or ENCODERS[codec]]
    return first_working(wanted, f"{codec} at crf {crf:g}", trial or trial_encode)


def choose_live_encoder(
    spec: VideoSpec, bits: int, trial: Callable[[EncoderSettings], str | None] | None = None
) -> EncoderSettings | None:
    """The H.264 encoder for a live stream: constant bit rate `bits` per second, a closed GOP of 2 s; as
    above."""
    wanted = [
        EncoderSettings(kind, spec, LIVE_OPTIONS[kind.name](bits), keyframe_seconds=LIVE_KEYFRAME_SECONDS)
        for kind in ENCODERS["h264"]
    ]
    return first_working(wanted, f"live h264 at {bits // 1000} kbit/s", trial or trial_encode)


def first_working(
    wanted: Sequence[EncoderSettings], what: str, trial: Callable[[EncoderSettings], str | None]
) -> EncoderSettings | None:
    """The first settings whose encoder is here and, for hardware, passes the trial; logs the choice and
    why."""
    for settings in wanted:
        name = settings.kind.name
        if name not in av.codecs_available:
            log.info("%s: not in PyAV's FFmpeg", name)
        elif settings.kind.hardware and (reason := trial(settings)):
            log.info("%s: not used, trial encode failed: %s", name, reason)
        else:
            why = "a trial encode worked" if settings.kind.hardware else "in PyAV's FFmpeg"
            log.info("encoding %s with %s (%s)", what, name, why)
            return settings
    return None


def trial_encode(settings: EncoderSettings) -> str | None:
    """Encode a few grey frames; None when packets came out, else the reason why not."""
    spec = settings.spec
    grey = np.full((spec.height * 3 // 2, spec.width), 128, np.uint8)
    try:
        with ffmpeg_reasons():
            encoder = VideoEncoder(settings)
        packets = [packet for _ in range(4) for packet in encoder.encode(grey)] + encoder.drain()
        encoder.close()
    except OutputError as error:
        return str(error)
    except MEDIA_ERRORS as error:
        return words(error)
    return None if sum(packet.size for packet in packets) else "no packet came out"
