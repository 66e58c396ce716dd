"""Names, rates and qualities: what they mean, and what is refused before anything is made."""

import logging
import os
from fractions import Fraction

import pytest

from wanrt.errors import OutputError, UsageError
from wanrt.output import Quality, Target, VideoSpec, check_target, exact_fps, open_sink


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        (16, Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        ("29.97", Fraction(30000, 1001)),
        ("59.94", Fraction(60000, 1001)),
        ("24000/1001", Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)),
        (23.5, Fraction(47, 2)),
        (Fraction(1, 3), Fraction(1, 3)),
    ],
)
def test_rates(given, exact):
    assert exact_fps(given) == exact


@pytest.mark.parametrize("bad", [0, -1, 1001, "fast", "1/0", float("nan"), float("inf"), ""])
def test_bad_rates(bad):
    with pytest.raises(UsageError, match="fps"):
        exact_fps(bad)


@pytest.mark.parametrize("size", [(0, 2), (3, 2), (2, 5), (-2, 2)])
def test_bad_sizes(size):
    with pytest.raises(UsageError, match="expected even numbers"):
        VideoSpec(*size, Fraction(16))


@pytest.mark.parametrize(
    ("name", "codec", "container", "chosen"),
    [
        ("a.mp4", None, "mp4", "h264"),
        ("A.MP4", "H265", "mp4", "hevc"),
        ("a.webm", None, "webm", "vp9"),
        ("a.webm", "av1", "webm", "av1"),
        ("a.b.mkv", "auto", "mkv", "h264"),
        ("a.gif", "h264", "gif", "gif"),
        ("x/frame_%05d.png", None, "png", "png"),
        ("frames/", None, "png", "png"),
    ],
)
def test_targets(name, codec, container, chosen):
    target = Target.parse(name, codec)
    assert (target.container, target.codec) == (container, chosen)


@pytest.mark.parametrize(
    ("name", "codec", "match"),
    [
        ("a", None, "extension none, expected .mp4"),
        ("a.avi", None, "extension '.avi'"),
        ("a.mp4", "vp9", "got 'vp9', expected h264 or hevc or av1"),
        ("a.webm", "h264", "expected vp9 or av1"),
        ("a.mp4", "theora", "got 'theora'"),
        ("a.png", None, r"such as a_%05d.png"),
        ("a_%d_%d.png", None, "one frame number"),
    ],
)
def test_bad_targets(name, codec, match):
    with pytest.raises(UsageError, match=match):
        Target.parse(name, codec)


def test_frame_names():
    assert Target.parse("x/f%03d.png").frame_path(7).as_posix() == "x/f007.png"
    assert Target.parse("x/50% f%d.png").frame_path(12).name == "50% f12.png"


def test_existing_files_need_force(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UsageError, match=r"a\.mp4: exists; --force"):
        check_target(tmp_path / "a.mp4")
    check_target(tmp_path / "a.mp4", force=True)
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        check_target(tmp_path / "dir.mp4", force=True)


def test_directories_are_checked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no such directory; create it"):
        check_target(tmp_path / "none" / "a.mp4")
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "file" / "a.mp4")
    check_target(f"{tmp_path}/none/frames/")
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "a check leaves nothing behind"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write there"):
        check_target(tmp_path / "a.mp4")


def test_unwritable_directory_even_for_root():
    with pytest.raises(OutputError, match="/proc: cannot write there"):
        check_target("/proc/a.mp4")


def test_temporary_names_are_hidden_beside_the_target_and_unique(tmp_path):
    target = Target.parse(tmp_path / ("x" * 240 + ".mp4"))
    names = {target.temporary("mp4") for _ in range(50)}
    assert len(names) == 50
    for path in names:
        assert path.parent == tmp_path
        assert path.name.startswith(".")
        assert f".{os.getpid()}-" in path.name
        path.touch()  # short enough for the file system


def test_leftovers_of_killed_runs_are_named_once(tmp_path, caplog):
    dead, living = (tmp_path / f".a.mp4.{pid}-abcdef.part.mp4" for pid in (999999999, os.getpid()))
    for path in (dead, living):
        path.touch()
    with caplog.at_level(logging.WARNING, "wanrt.output"):
        check_target(tmp_path / "a.mp4")  # as a run does before it loads anything
        open_sink(tmp_path / "a.mp4", VideoSpec(32, 32, 16)).abort()
    assert [dead.name in message for message in caplog.messages] == [True]


def test_quality():
    assert Quality.parse("75").crf("h264") == 18
    assert [Quality(value).crf("h264") for value in (0, 50, 100)] == [36, 24, 12]
    assert Quality.parse("crf=12").crf("h264") == 12
    assert Quality.parse("crf=60").crf("av1") == 60
    assert Quality.parse(Quality(20)) == Quality(20)
    for bad in ("best", "101", "-1", "crf=64", "crf=x", "q=3", "nan"):
        with pytest.raises(UsageError):
            Quality.parse(bad)
    with pytest.raises(UsageError, match="0 to 51 for h264"):
        Quality.parse("crf=60").crf("h264")
