"""Addresses, AMF and FLV: the bytes of a live stream, without a network."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanrt.errors import UsageError
from wanrt.output import VideoSpec, amf, flv
from wanrt.output.address import Address
from wanrt.output.encoder import VideoEncoder, choose_live_encoder

SPEC = VideoSpec(96, 64, 16)


@pytest.mark.parametrize(
    ("url", "host", "port", "app", "key"),
    [
        ("rtmp://a.example/live/s3cret", "a.example", 1935, "live", "s3cret"),
        (
            "rtmps://live.example:443/app/x/s3cret?token=s3cret2",
            "live.example",
            443,
            "app/x",
            "s3cret?token=s3cret2",
        ),
        ("rtmp://[::1]:1936/live/s3cret", "::1", 1936, "live", "s3cret"),
        ("udp://239.0.0.1:5000", "239.0.0.1", 5000, "", ""),
        ("srt://h:9000?passphrase=s3cret", "h", 9000, "", ""),
    ],
)
def test_addresses(url, host, port, app, key):
    address = Address.parse(url)
    assert (address.host, address.port, address.app, address.key) == (host, port, app, key)
    assert "s3cret" not in f"{address} {address!r} {address.tc_url}"
    assert address.redact(f"cannot open {url}: {key or 'no'}").count("s3cret") == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example/live/s3cret",
        "a.example/live/s3cret",
        "rtmp://a.example/s3cret",
        "rtmp:///live/s3cret",
        "rtmp://a.example:port/live/s3cret",
        "rtmp://a.example:99999/live/s3cret",
        "udp://a.example",
        "srt://:9000?passphrase=s3cret",
        "",
    ],
)
def test_wrong_addresses_name_no_key(url):
    with pytest.raises(UsageError) as caught:
        Address.parse(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None or "s3cret" not in str(caught.value.__context__)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES, max_size=5))
def test_amf_round_trip(values):
    assert amf.decode(amf.encode(*values)) == values


@given(st.binary(max_size=200))
def test_amf_of_garbage_is_a_value_error_at_most(data):
    try:
        amf.decode(data)
    except ValueError as error:
        assert "AMF0" in str(error)  # noqa: PT017


def test_amf_of_nested_garbage_is_no_recursion_error():
    with pytest.raises(ValueError, match="AMF0"):
        amf.decode(b"\x0a\x00\x00\x00\x01" * 5000)


def test_amf_bytes_as_the_specification_has_them():
    assert amf.encode("a", 1.0, True, None) == b"\x02\x00\x01a\x00\x3f\xf0\0\0\0\0\0\0\x01\x01\x05"
    assert amf.encode({"k": False}) == b"\x03\x00\x01k\x01\x00\x00\x00\x09"
    assert amf.encode(amf.EcmaArray(k=False)) == b"\x08\x00\x00\x00\x01\x00\x01k\x01\x00\x00\x00\x09"


def test_nal_units_with_both_kinds_of_start_code():
    units = [b"\x67\x01\x02", b"\x68\x03", b"\x65\x00\x00\x03\x01"]
    data = b"\0\0\0\1" + units[0] + b"\0\0\1" + units[1] + b"\0\0\0\1" + units[2]
    assert list(flv.nal_units(data)) == units
    assert list(flv.nal_units(b"")) == []


@pytest.fixture
def stream(movie):
    """A live encoder's packets and what goes before them."""
    import torch

    from wanrt_kernels.nv12 import nv12_ref

    encoder = VideoEncoder(choose_live_encoder(SPEC, 400_000, trial=lambda _: "not tried"))
    planes = nv12_ref(torch.from_numpy(movie(80))).numpy()
    packets = [packet for frame in planes for packet in encoder.encode(frame)]
    return encoder, packets


def test_flv_of_our_own_plays(tmp_path, stream, decode, movie, psnr):
    encoder, packets = stream
    audio = flv.SilentAudio.encoded()
    tags = [
        flv.metadata_tag(SPEC, 400_000, "x"),
        flv.Tag(flv.VIDEO, 0, flv.video_header(bytes(encoder.stream.codec_context.extradata))),
        audio.header_tag(),
    ]
    for number, packet in enumerate(packets):
        tags.append(
            flv.Tag(
                flv.VIDEO,
                flv.milliseconds(number, SPEC.fps),
                flv.video_body(bytes(packet), packet.is_keyframe),
            )
        )
        tags.append(audio.tag(number))
    path = tmp_path / "a.flv"
    path.write_bytes(flv.file_bytes(tags))
    got = decode(path)
    assert psnr(got.frames, movie(80)) >= 35
    assert [start * 1000 for start in got.starts] == [round(1000 * number / 16) for number in range(80)]
    assert "Audio: aac (LC), 48000 Hz, stereo" in got.words
    assert "rror" not in got.words


def test_live_encoder_is_what_services_ask_for(stream):
    _, packets = stream
    assert [number for number, packet in enumerate(packets) if packet.is_keyframe] == [0, 32, 64], (
        "2 s, closed"
    )
    bits = [8 * sum(packet.size for packet in packets[at : at + 16]) for at in (16, 32, 48, 64)]
    assert np.allclose(bits, 400_000, rtol=0.1), "constant bit rate, second by second"


def test_silence_is_silent(tmp_path, ffmpeg):
    audio = flv.SilentAudio.encoded()
    path = tmp_path / "a.aac"
    path.write_bytes(flv.adts(audio.frame) * 50)
    done = ffmpeg("-i", path, "-f", "s16le", "-")
    sound = np.frombuffer(done.stdout, np.int16)
    assert len(sound) == 50 * 1024 * 2
    assert np.abs(sound.astype(int)).max() <= 1
