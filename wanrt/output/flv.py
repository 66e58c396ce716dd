"""H.264 and AAC as FLV tag bodies, which are RTMP's messages too.

Formats: Adobe, "Video File Format Specification" version 10.1, annex E; ISO/IEC 14496-15, section 5.2.4
(avcC); ITU-T H.264, annex B (start codes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from . import amf
from .spec import VideoSpec

START_CODE = re.compile(rb"\x00\x00\x01")
SPS, PPS, DELIMITER = 7, 8, 9

AUDIO_RATE = 48_000
AUDIO_FRAME = 1024  # samples of an AAC frame
AUDIO_BITS = 64_000

AUDIO, VIDEO, SCRIPT = 8, 9, 18  # tag types, and RTMP message types


@dataclass(frozen=True)
class Tag:
    """One FLV tag.

    Attributes:
        kind: AUDIO, VIDEO or SCRIPT.
        milliseconds: timestamp.
        body: the tag without its header.
    """

    kind: int
    milliseconds: int
    body: bytes


def nal_units(data: bytes) -> Iterator[bytes]:
    """NAL units of an Annex B byte stream."""
    starts = [match.end() for match in START_CODE.finditer(data)]
    stops = [start - len(b"\0\0\1") for start in starts[1:]] + [len(data)]
    for start, stop in zip(starts, stops, strict=False):
        yield data[start:stop].rstrip(b"\0")  # zeros before a start code; a unit itself never ends in one


def nal_type(unit: bytes) -> int:
    """nal_unit_type."""
    return unit[0] & 31 if unit else 0


def video_header(extradata: bytes) -> bytes:
    """The AVC sequence header (avcC) of an encoder's Annex B parameter sets."""
    units = list(nal_units(extradata))
    sps = next(unit for unit in units if nal_type(unit) == SPS)
    pps = next(unit for unit in units if nal_type(unit) == PPS)
    head = bytes([1, *sps[1:4], 0xFF, 0xE1])  # version, profile, compatibility, level, 4-byte lengths, 1 SPS
    config = head + _with_length(sps, 2) + b"\x01" + _with_length(pps, 2)
    if sps[1] in (100, 110, 122, 144):  # High profiles add chroma format 4:2:0 and 8 bits
        config += bytes([0xFD, 0xF8, 0xF8, 0])
    return bytes([0x17, 0, 0, 0, 0]) + config


def video_body(data: bytes, keyframe: bool) -> bytes:
    """One frame, Annex B, as a tag body; parameter sets and delimiters stay in the header."""
    units = (unit for unit in nal_units(data) if nal_type(unit) not in (SPS, PPS, DELIMITER))
    return bytes([0x17 if keyframe else 0x27, 1, 0, 0, 0]) + b"".join(_with_length(unit, 4) for unit in units)


def _with_length(unit: bytes, width: int) -> bytes:
    return len(unit).to_bytes(width, "big") + unit


@dataclass(frozen=True)
class SilentAudio:
    """A silent AAC-LC track, 48 kHz stereo: services refuse or mute streams without audio.

    Attributes:
        config: AudioSpecificConfig.
        frame: one frame of silence, good at any place after the first.
    """

    config: bytes
    frame: bytes

    @classmethod
    def encoded(cls) -> SilentAudio:
        """Encode some silence and keep a frame from its middle."""
        encoder = av.CodecContext.create("aac", "w")
        assert isinstance(encoder, av.AudioCodecContext)
        encoder.sample_rate, encoder.layout, encoder.format = AUDIO_RATE, "stereo", "fltp"
        encoder.bit_rate = AUDIO_BITS
        encoder.flags |= 1 << 22  # AV_CODEC_FLAG_GLOBAL_HEADER: the configuration apart, frames raw
        packets: list[bytes] = []
        for number in range(6):
            silence = np.zeros((2, AUDIO_FRAME), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = AUDIO_RATE, number * AUDIO_FRAME
            packets += [bytes(packet) for packet in encoder.encode(frame)]
        return cls(bytes(encoder.extradata or b""), packets[3])

    def header_tag(self) -> Tag:
        """The AAC sequence header."""
        return Tag(AUDIO, 0, b"\xaf\x00" + self.config)

    def tag(self, number: int) -> Tag:
        """Frame `number` (from 0)."""
        return Tag(AUDIO, milliseconds(number, Fraction(AUDIO_RATE, AUDIO_FRAME)), b"\xaf\x01" + self.frame)


def adts(frame: bytes) -> bytes:
    """An AAC-LC frame of 48 kHz stereo with its ADTS header (ISO/IEC 14496-3, section 1.A.2.2)."""
    size = len(frame) + 7
    return bytes([0xFF, 0xF1, 0x4C, 0x80 | size >> 11, size >> 3 & 255, (size & 7) << 5 | 0x1F, 0xFC]) + frame


def milliseconds(number: int, rate: Fraction) -> int:
    """When frame `number` of a constant rate is, rounded once from the exact time, so that nothing drifts."""
    return round(1000 * number / rate)


def metadata_tag(spec: VideoSpec, video_bits: int, version: str) -> Tag:
    """onMetaData."""
    facts = amf.EcmaArray(
        width=spec.width,
        height=spec.height,
        framerate=float(spec.fps),
        videocodecid=7,
        videodatarate=video_bits / 1000,
        audiocodecid=10,
        audiodatarate=AUDIO_BITS / 1000,
        audiosamplerate=AUDIO_RATE,
        audiosamplesize=16,
        stereo=True,
        encoder=f"wanrt {version}",
    )
    return Tag(SCRIPT, 0, amf.encode("onMetaData", facts))


def file_bytes(tags: list[Tag]) -> bytes:
    """An FLV file of tags."""
    parts = [b"FLV\x01\x05\x00\x00\x00\x09\x00\x00\x00\x00"]
    for tag in tags:
        stamp = tag.milliseconds
        head = bytes([tag.kind]) + len(tag.body).to_bytes(3, "big")
        head += (stamp & 0xFFFFFF).to_bytes(3, "big") + bytes([stamp >> 24 & 255, 0, 0, 0])
        parts += [head, tag.body, (len(head) + len(tag.body)).to_bytes(4, "big")]
    return b"".join(parts)
