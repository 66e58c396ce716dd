"""Files of every kind, read back by another decoder than the one that wrote them."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from wanrt.errors import OutputError, UsageError
from wanrt.output import VideoSpec, open_sink
from wanrt.output.fragments import boxes
from wanrt.output.metadata import read_metadata

SPEC = VideoSpec(96, 64, Fraction(16))
MOVIES = [
    ("a.mp4", "h264"),
    ("a.mp4", "hevc"),
    ("a.mp4", "av1"),
    ("a.mov", "h264"),
    ("a.mov", "hevc"),
    ("a.mkv", "h264"),
    ("a.mkv", "hevc"),
    ("a.mkv", "av1"),
    ("a.mkv", "vp9"),
    ("a.webm", "vp9"),
    ("a.webm", "av1"),
]


def write(path, frames, *, chunk=5, spec=SPEC, **options):
    """The frames in chunks, as a pipeline would."""
    sink = open_sink(path, spec, threads=1, **options)
    for at in range(0, len(frames), chunk):
        sink.write(frames[at : at + chunk])
        sink.flush_chunk()
    return sink.finish()


@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
@pytest.mark.parametrize(("name", "codec"), MOVIES)
def test_movies_hold_what_went_in(tmp_path, decode, movie, psnr, name, codec, muxer):
    frames = movie(21)
    path = write(tmp_path / name, frames, codec=codec, quality=100, muxer=muxer)
    assert path == tmp_path / name
    assert [file.name for file in tmp_path.iterdir()] == [name], "no temporary file stays"
    got = decode(path)
    assert got.frames.shape == frames.shape
    assert psnr(got.frames, frames) >= 38  # every codec's quality 100; H.264 has its own test at 40 dB
    assert f"Video: {codec}" in got.words
    assert re.search(r"yuv420p\(tv, bt709", got.words)


def test_h264_at_crf_12_is_40_db(tmp_path, decode, movie, psnr):
    frames = movie(24)
    got = decode(write(tmp_path / "a.mp4", frames, quality="crf=12"))
    assert psnr(got.frames, frames) >= 40


@pytest.mark.parametrize(
    "fps", [Fraction(16), Fraction(24), Fraction(24000, 1001), Fraction(25, 2), Fraction(8)]
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_rate_is_constant_and_exact(tmp_path, decode, movie, name, fps):
    got = decode(write(tmp_path / name, movie(13), spec=VideoSpec(96, 64, fps), chunk=4))
    assert got.starts == [index / fps for index in range(13)]
    assert got.durations == [1 / fps] * 13


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.gif"])
def test_rate_is_as_exact_as_the_container_counts(tmp_path, decode, movie, name):
    """Matroska counts milliseconds and GIF hundredths; no frame strays by more than one count."""
    fps, count = Fraction(24000, 1001), Fraction(1, 100 if name.endswith("gif") else 1000)
    got = decode(write(tmp_path / name, movie(31), spec=VideoSpec(96, 64, fps)))
    assert max(abs(start - index / fps) for index, start in enumerate(got.starts)) <= count
    assert abs(got.end - 31 / fps) <= 2 * count
    if not name.endswith("gif"):
        assert "23.98 fps" in got.words


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.gif", "a_%03d.png"])
def test_any_number_of_frames(tmp_path, decode, movie, name, count):
    path = write(tmp_path / name, movie(count), chunk=3)
    assert len(decode(path).frames) == count


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_colours_survive(tmp_path, decode, codec):
    """Flat patches away from their edges come back within 3 levels: 8-bit limited range alone costs up to 2."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]])
    frame = np.repeat(np.repeat(colours.reshape(2, 3, 3), 32, axis=0), 32, axis=1).astype(np.uint8)
    got = decode(write(tmp_path / "a.mp4", np.stack([frame] * 3), codec=codec, quality=100)).frames
    centres = got[:, 16::32, 16::32].astype(int)
    assert np.abs(centres - colours.reshape(2, 3, 3)).max() <= 3


@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
def test_mp4_is_tagged_and_starts_fast(tmp_path, ffmpeg, movie, muxer):
    data = write(tmp_path / "a.mp4", movie(6), muxer=muxer).read_bytes()
    kinds = [kind for kind, _ in boxes(data)]
    assert kinds.index(b"moov") < kinds.index(b"mdat")
    assert b"moof" not in kinds
    # nclx: primaries, transfer, matrix 1 (BT.709), full-range flag off
    colr = data[data.index(b"colr") + 4 :]
    assert colr[:11] == b"nclx" + bytes([0, 1, 0, 1, 0, 1, 0])
    raw = tmp_path / "a.h264"
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-bsf:v", "h264_mp4toannexb", raw)
    assert b"yuv420p(tv, bt709" in ffmpeg("-i", raw).stderr, "the bitstream says it too"


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.gif"])
def test_metadata_comes_back(tmp_path, movie, name):
    prompt = "a red ball, \u00fcber \u201call\u201d = ; #\n" * 200
    metadata = {"prompt": prompt, "seed": 7, "preset": "wan-tiny", "version": "0.1.0", "title": "Ball"}
    path = write(tmp_path / name, movie(3), metadata=metadata)
    assert read_metadata(path) == {key: str(value) for key, value in metadata.items()}


def test_title_is_where_players_look(tmp_path, ffmpeg, movie):
    path = write(tmp_path / "a.mp4", movie(3), metadata={"title": "Ball", "prompt": "a red ball"})
    words = ffmpeg("-i", path).stderr.decode()
    assert re.search(r"title +: Ball", words)
    assert re.search(r"description +: a red ball", words)


def test_png_frames_are_exact(tmp_path, decode, movie):
    frames = movie(4)
    write(f"{tmp_path}/new/", frames, metadata={"seed": 7})
    names = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert names == [f"frame_0000{number}.png" for number in (1, 2, 3, 4)]
    assert np.array_equal(decode(tmp_path / "new" / "frame_%05d.png").frames, frames)
    image = pytest.importorskip("PIL.Image").open(tmp_path / "new" / "frame_00001.png")
    assert image.text["comment"] == '{"seed": "7"}'


def test_png_replaces_a_longer_sequence_whole(tmp_path, movie):
    name = f"{tmp_path}/100%_%03d.png"
    write(name, movie(5))
    with pytest.raises(UsageError, match="5 such frames exist"):
        open_sink(name, SPEC)
    write(name, movie(2), force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["100%_001.png", "100%_002.png"]


def test_gif_looks_right(tmp_path, decode, movie, psnr):
    frames = movie(8)
    got = decode(write(tmp_path / "a.gif", frames)).frames
    assert len(got) == 8
    assert psnr(got, frames) >= 28  # 256 colours a frame, dithered


@pytest.mark.parametrize("form", ["numpy", "tensor", "float", "planar"])
def test_any_form_of_pixels(tmp_path, decode, movie, psnr, form):
    frames = movie(5)
    tensor = torch.from_numpy(frames)
    floats = tensor.float() / 127.5 - 1
    planar = floats.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    pixels = {"numpy": frames, "tensor": tensor, "float": floats, "planar": planar}[form]
    got = decode(write(tmp_path / "a.mp4", pixels, quality=100)).frames
    assert psnr(got, frames) >= 40


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a_%d.png"])
@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
def test_wrong_frames_are_refused(tmp_path, name, muxer):
    sink = open_sink(tmp_path / name, SPEC, muxer=muxer)
    with pytest.raises(ValueError, match=r"expected \[T, 64, 96, 3\]"):
        sink.write(np.zeros((1, 32, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="int64, expected uint8"):
        sink.write(np.zeros((1, 64, 96, 3), np.int64))
    assert sink.abort() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a_%d.png"])
def test_no_frame_no_file(tmp_path, name, muxer):
    sink = open_sink(tmp_path / name, SPEC, muxer=muxer)
    with pytest.raises(OutputError, match="no frame was made"):
        sink.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("muxer", ["pyav", "ffmpeg"])
def test_abort_keeps_a_playable_file(tmp_path, decode, movie, muxer):
    sink = open_sink(tmp_path / "a.mkv", SPEC, muxer=muxer)
    sink.write(movie(7))
    kept = sink.abort()
    assert kept == tmp_path / "a.partial.mp4"
    assert len(decode(kept).frames) == 7
    sink = open_sink(tmp_path / "a.mkv", SPEC, muxer=muxer)
    sink.write(movie(2))
    assert sink.abort() == tmp_path / "a.partial-2.mp4", "an earlier one is not overwritten"


def write_good_then_bad(sink, frames):
    sink.write(frames)
    sink.write(frames[:, 1:])


def test_with_block_finishes_or_aborts(tmp_path, movie):
    with open_sink(tmp_path / "a.mp4", SPEC) as sink:
        sink.write(movie(2))
    with pytest.raises(ValueError, match="expected"), open_sink(tmp_path / "b.mp4", SPEC) as sink:
        write_good_then_bad(sink, movie(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "b.partial.mp4"]


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path, decode, movie):
    sink = open_sink(tmp_path / "a.mp4", SPEC)
    sink.write(movie(4))
    (tmp_path / "a.mp4").write_text("precious")
    with pytest.raises(OutputError, match=r"exists; --force.*plays: .*a\.partial\.mp4"):
        sink.finish()
    assert (tmp_path / "a.mp4").read_text() == "precious"
    assert len(decode(tmp_path / "a.partial.mp4").frames) == 4


def test_force_replaces_atomically(tmp_path, decode, movie):
    path = tmp_path / "a.mp4"
    path.write_text("old")
    sink = open_sink(path, SPEC, force=True)
    sink.write(movie(2))
    assert path.read_text() == "old", "until the new one is whole"
    sink.finish()
    assert len(decode(path).frames) == 2


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
def test_quality_is_monotonic(tmp_path, movie, codec):
    noise = np.random.default_rng(0).integers(0, 64, (4, 64, 96, 3), dtype=np.uint8) + movie(4) // 2
    files = [
        write(tmp_path / f"{quality}.mkv", noise, codec=codec, quality=quality) for quality in (0, 50, 100)
    ]
    sizes = [file.stat().st_size for file in files]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[0]


def test_pipe_command_uses_the_exact_rate(tmp_path):
    from wanrt.output.pipe import choose_pipe_encoder, pipe_command
    from wanrt.output.quality import Quality

    settings = choose_pipe_encoder("h264", VideoSpec(96, 64, "29.97"), Quality())
    command = pipe_command(Path("ffmpeg"), settings, tmp_path / "x.mp4")
    assert command[command.index("-r") + 1] == "30000/1001"
