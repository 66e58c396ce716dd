"""Which encoder is taken, and that it is said why; no encoder keeps a frame back."""

import logging
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest

from wanrt.errors import OutputError
from wanrt.output import Quality, VideoSpec, open_sink
from wanrt.output.encoder import (
    ENCODERS,
    EncoderKind,
    EncoderSettings,
    VideoEncoder,
    choose_encoder,
    trial_encode,
)

SPEC = VideoSpec(64, 48, Fraction(16))
SOFTWARE = [(codec, kind) for codec, kinds in ENCODERS.items() for kind in kinds if not kind.hardware]


def settings_of(codec):
    return choose_encoder(codec, SPEC, Quality(), trial=lambda _: "not tried")


def test_hardware_needs_a_trial_encode_that_works(caplog):
    with caplog.at_level(logging.INFO, "wanrt.output"):
        refused = choose_encoder("h264", SPEC, Quality(), trial=lambda _: "no such device")
        taken = choose_encoder("h264", SPEC, Quality(), trial=lambda _: None)
    assert (refused.kind.name, taken.kind.name) == ("libx264", "h264_nvenc")
    assert caplog.messages[0] == "h264_nvenc: not used, trial encode failed: no such device"
    assert "h264 at crf 18 with libx264 (in PyAV's FFmpeg)" in caplog.messages[1]
    assert "h264 at crf 18 with h264_nvenc (a trial encode worked)" in caplog.messages[2]


def test_trial_encode_tells_working_from_broken():
    assert trial_encode(settings_of("h264")) is None
    broken = EncoderKind("libx264", "nv12", lambda crf: {"preset": "no-such-preset"})
    settings = choose_encoder("h264", SPEC, Quality(), kinds=[broken])
    assert "libx264: cannot be opened" in trial_encode(settings)


def test_hardware_that_is_not_there_says_why():
    kind = ENCODERS["h264"][0]
    settings = choose_encoder("h264", SPEC, Quality(), kinds=[kind], trial=lambda _: None)
    reason = trial_encode(settings)
    if reason is None:
        pytest.skip("this machine has NVENC")
    assert reason != "encoder h264_nvenc: cannot be opened (Operation not permitted)"


def test_missing_encoders_leave_the_second_path(tmp_path, monkeypatch, caplog, decode, movie):
    monkeypatch.setitem(ENCODERS, "h264", (EncoderKind("libx264_gone", "nv12", ENCODERS["h264"][1].options),))
    assert choose_encoder("h264", SPEC, Quality()) is None
    with pytest.raises(OutputError, match="no encoder for h264 in PyAV's FFmpeg"):
        open_sink(tmp_path / "a.mp4", SPEC, muxer="pyav")
    with pytest.raises(OutputError, match="no encoder for h264 in PyAV or imageio-ffmpeg's ffmpeg"):
        open_sink(tmp_path / "a.mp4", SPEC)
    monkeypatch.setitem(
        ENCODERS, "h264", ENCODERS["h264"] + (EncoderKind("libopenh264", "yuv420p", lambda _: {}),)
    )
    with caplog.at_level(logging.INFO, "wanrt.output"):
        sink = open_sink(tmp_path / "a.mp4", VideoSpec(96, 64, Fraction(16)))
    assert "with libopenh264" in caplog.text
    assert "imageio-ffmpeg's ffmpeg" in caplog.text
    sink.write(movie(5))
    assert len(decode(sink.finish()).frames) == 5


@pytest.mark.parametrize(("codec", "kind"), SOFTWARE)
def test_a_frame_that_went_in_comes_out(codec, kind):
    """The crash safety and the latency of live streams rest on this."""
    encoder = VideoEncoder(settings_of(codec))
    planes = np.full((72, 64), 128, np.uint8)
    for number in range(40):
        planes[:48] = number * 4
        (packet,) = encoder.encode(planes)
        assert (packet.pts, packet.dts, packet.duration) == (number, number, 1)
    assert encoder.drain() == []


def test_keyframes_come_in_time_and_when_asked():
    encoder = VideoEncoder(settings_of("h264"))
    planes = np.full((72, 64), 128, np.uint8)
    keys = [
        n for n in range(140) for packet in encoder.encode(planes, keyframe=n == 70) if packet.is_keyframe
    ]
    assert keys[:3] == [0, 64, 70]
    assert max(b - a for a, b in pairwise(keys)) <= 64


def test_an_external_library_that_fails_is_a_reason_not_a_crash(monkeypatch):
    """A GPU without NVENC answers avcodec_open2 with ExternalError, which is no OSError."""

    def refuse(self):
        raise av.error.ExternalError(542398533, "Generic error in an external library")

    monkeypatch.setattr(VideoEncoder, "_open_stream", refuse)
    settings = EncoderSettings(ENCODERS["h264"][0], SPEC, {})
    assert "external library" in str(trial_encode(settings))
