"""Measurements on disk: whole, with the user's permissions, refused before a run where they cannot be written."""

import json
import os
import stat
from pathlib import Path

import pytest

from wanrt.errors import UsageError
from wanrt.telemetry.files import check_measurement, write_json


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_permissions_follow_the_umask(tmp_path, umask):
    path = write_json(tmp_path / "s.json", {"a": 1})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_a_pipe_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_measurement(pipe)
    write_json(pipe, [1])
    assert json.loads(os.read(reader, 100)) == [1]
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_cannot_be_written_is_refused(tmp_path):
    check_measurement(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="is a directory"):
        check_measurement(tmp_path)
    with pytest.raises(UsageError, match="no directory"):
        check_measurement(tmp_path / "none" / "s.json")
    with pytest.raises(UsageError, match="cannot be written"):
        check_measurement(Path("/proc/s.json"))
    with pytest.raises(UsageError, match="twice"):
        check_measurement(tmp_path / "x.mp4", {tmp_path / "x.mp4"})
