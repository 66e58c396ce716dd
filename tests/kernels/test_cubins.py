"""Compiled kernels on disk, with a compiler that only counts."""

import logging
import os

import pytest

from wanrt_kernels import cubins, nvrtc


@pytest.fixture
def compiled(monkeypatch):
    """The sources that were compiled; their code is their own bytes."""
    sources = []

    def compile_cubin(source, architecture):
        sources.append((source, architecture))
        return f"code of {source} for {architecture}".encode()

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    return sources


@pytest.fixture
def kept(monkeypatch, tmp_path):
    folder = tmp_path / "deep" / "kernels"
    monkeypatch.setenv(cubins.SWITCH, str(folder))
    return folder


def test_nothing_is_compiled_twice(compiled, kept):
    for _ in range(2):
        assert cubins.cubin("a", "sm_90a") == b"code of a for sm_90a"
    assert compiled == [("a", "sm_90a")]
    assert [path.suffix for path in kept.iterdir()] == [".cubin"]


def test_what_the_code_depends_on_makes_another_file(compiled, kept, monkeypatch):
    cubins.cubin("a", "sm_90a")
    cubins.cubin("b", "sm_90a")
    cubins.cubin("a", "sm_100a")
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    cubins.cubin("a", "sm_90a")
    monkeypatch.setattr(nvrtc, "OPTIONS", ("--std=c++20",))
    cubins.cubin("a", "sm_90a")
    assert len(compiled) == len(list(kept.iterdir())) == 5


@pytest.mark.parametrize(
    "damage", [lambda code: code[:-1], lambda code: code[:40] + b"?" + code[41:], lambda code: b""]
)
def test_a_damaged_file_is_replaced(compiled, kept, caplog, damage):
    cubins.cubin("a", "sm_90a")
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, "wanrt.kernels"):
        assert cubins.cubin("a", "sm_90a") == b"code of a for sm_90a"
    assert "is damaged" in caplog.text
    assert len(compiled) == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_keeps_nobody(compiled, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cubins.SWITCH, str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "wanrt.kernels"):
        assert cubins.cubin("a", "sm_90a") == b"code of a for sm_90a"
    assert "not kept" in caplog.text


def test_empty_keeps_nothing(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv(cubins.SWITCH, "")
    monkeypatch.chdir(tmp_path)
    cubins.cubin("a", "sm_90a")
    cubins.cubin("a", "sm_90a")
    assert len(compiled) == 2
    assert not list(tmp_path.iterdir())


def test_the_users_cache_directory_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv(cubins.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert os.fspath(cubins.folder()) == os.fspath(tmp_path / "wanrt" / "kernels")


def test_a_real_compiler_has_a_version():
    try:
        nvrtc.nvrtc()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    major, _, minor = nvrtc.version().partition(".")
    assert int(major) >= 12
    assert int(minor) >= 0
