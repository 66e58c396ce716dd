"""Opening checkpoints of every format, and refusing everything else in one line."""

import contextlib
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from wanrt.errors import WeightsError
from wanrt.weights.files import find_checkpoints
from wanrt.weights.sources import TensorsSource, open_source

STATE = {"a.weight": torch.arange(24.0).view(4, 6), "b.bias": torch.ones(3, dtype=torch.bfloat16)}


def refused(path) -> str:
    """The message of the WeightsError that opening `path` raises; always one line that names the path."""
    with pytest.raises(WeightsError) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 500 + len(str(path))
    return message


@pytest.fixture(params=["safetensors", "sharded", "zip", "legacy", "generator", "odd name"])
def checkpoint(request, tmp_path, zoo):
    path = tmp_path / "model.bin"
    match request.param:
        case "safetensors":
            save_file(STATE, path)
        case "odd name":
            path = tmp_path / "model.pth"  # a safetensors file all the same
            save_file(STATE, path)
        case "sharded":
            return zoo.shard(STATE, tmp_path)
        case "zip":
            torch.save(STATE, path)
        case "legacy":
            torch.save(STATE, path, _use_new_zipfile_serialization=False)
        case "generator":
            torch.save({"generator": STATE, "critic": {"x": torch.ones(1)}, "step": 7}, path)
    return path


def test_every_format_reads_the_same(checkpoint):
    source = open_source(checkpoint)
    assert set(source.names()) == set(STATE)
    for name, tensor in STATE.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) is tensor.dtype
        assert source.read(name).equal(tensor)
    index = (slice(1, 3), slice(None, None))
    assert source.read("a.weight", index).equal(STATE["a.weight"][1:3])
    columns = (slice(None), slice(2, 5))
    assert source.read("a.weight", columns).equal(STATE["a.weight"][:, 2:5])


def test_unknown_name_is_a_key_error(checkpoint):
    with pytest.raises(KeyError):
        open_source(checkpoint).shape("absent")


def test_a_directory_with_one_checkpoint_opens(tmp_path, zoo):
    zoo.shard(STATE, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert set(open_source(tmp_path).names()) == set(STATE)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["model.safetensors.index.json"]


def test_entries_of_a_training_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"generator": {"w": torch.zeros(1)}, "generator_ema": {"w": torch.ones(1)}}, path)
    assert open_source(path).read("w").item() == 1
    assert open_source(path, ("generator",)).read("w").item() == 0
    torch.save({"state_dict": {"model": {"w": torch.ones(1)}}}, path)
    assert open_source(path).names() == ("w",)


class Hostile:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, zipped):
    target = tmp_path / "owned"
    path = tmp_path / "model.pt"
    content = {"generator": {"w": torch.ones(1)}, "extra": Hostile(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert "refused" in message
    assert "system" in message
    assert not target.exists()


def test_bare_hostile_pickle_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    message = refused(path)
    assert "refused" in message
    assert "weights_only" not in message  # torch's own message advises to load the file unchecked
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Not found</html>" + b" " * 64, "a web page"),
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 64, "GGUF"),
        (b"\x93NUMPY" + b"\x00" * 64, "not a checkpoint"),
        (b"x", "not a checkpoint"),
        (b"PK\x03\x04" + b"garbage" * 30, "damaged torch checkpoint"),
        (b"\x80\x02garbage", "torch"),
        (b"\x80", "torch"),
        (b"{}", "not a safetensors index"),
        (b'{"weight_map": {}}', "not a safetensors index"),
        (b'{"weight_map": {"a": 3}}', "not a safetensors index"),
        (b'{"weight_map": {"a": "../../secret.safetensors"}}', "lies elsewhere"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "lies elsewhere"),
        (b'{"weight_map": {"a": "x.safetensors"}}', "1 of 1 shards are missing"),
        (b"{" * 100_000, "not a safetensors index"),
        ((2**62).to_bytes(8, "little") + b'{"a": 1}', "truncated"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ' + b"\x00" * 9, "damaged safetensors"),
    ],
)
def test_foreign_content_is_named(tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert said in refused(path)


def test_torch_files_that_hold_no_state_dict(tmp_path):
    path = tmp_path / "model.pt"
    for content in ([1, 2], {"a": 1}, torch.ones(2), {}, {1: torch.ones(1)}):
        torch.save(content, path)
        assert "holds no state dict" in refused(path)


def test_missing_file_and_directories(tmp_path, zoo):
    assert "no such file" in refused(tmp_path / "absent.safetensors")
    assert "0 checkpoints (none)" in refused(tmp_path)
    for name in ("a", "b"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    assert "2 checkpoints (a.safetensors, b.safetensors)" in refused(tmp_path)


def test_unreadable_file(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    path.chmod(0)
    assert "Permission denied" in refused(path)


@pytest.mark.parametrize("writer", ["safetensors", "zip", "legacy"])
def test_every_truncation_is_one_line(tmp_path, writer):
    path = tmp_path / "model.ckpt"
    if writer == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=writer == "zip")
    whole = path.read_bytes()
    for size in sorted({*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}):
        path.write_bytes(whole[:size])
        refused(path)


@pytest.mark.parametrize("writer", ["safetensors", "zip", "legacy", "index"])
def test_flipped_bytes_never_raise_anything_else(tmp_path, writer, zoo):
    rng = random.Random(5)
    path = tmp_path / "model.ckpt"
    match writer:
        case "safetensors":
            save_file(STATE, path)
        case "index":
            path = zoo.shard(STATE, tmp_path)
        case _:
            torch.save(STATE, path, _use_new_zipfile_serialization=writer == "zip")
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(WeightsError):
            source = open_source(path)
            for name in source.names():
                source.shape(name)


def test_zip_of_something_else(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    assert "damaged torch checkpoint" in refused(path)


def test_shard_that_lacks_a_tensor(tmp_path, zoo):
    index = zoo.shard(STATE, tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["c.weight"] = content["weight_map"]["a.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"lacks 1 tensors that .* promises, first c\.weight"):
        open_source(index)


def test_tensors_source(tmp_path):
    source = TensorsSource(STATE, tmp_path)
    assert source.read("a.weight", (slice(0, 1), slice(0, 2))).tolist() == [[0.0, 1.0]]
    assert source.metadata() == {}
