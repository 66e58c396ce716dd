"""`wanrt weights pull` against a hub-like server on loopback: progress, resume, refusals."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save

from wanrt.errors import OutputError, RunError, UsageError, WeightsError
from wanrt.script.preset import load_preset
from wanrt.weights.hub import pull as pull_file
from wanrt.weights.hub import pull_preset
from wanrt.weights.registry import HubFile

PRESET = """
kind  = "model"
name  = "test-model"
title = "Test"
[transformer]
dim = 256
ffn_dim = 96
num_layers = 1
num_heads = 2
[cache]
policy = "recompute"
window = 3
[sampling]
steps = [1000]
warped = true
[video]
sizes = ["64x64"]
[weights]
transformer = ["big.safetensors"]
[weights.hub]
transformer  = "owner/model:checkpoints/big.safetensors"
vae          = "owner/base:vae.pth"
text_encoder = "owner/base:text.safetensors.index.json"
tokenizer    = "owner/base:google/umt5-xxl/tokenizer.json"
"""
BIG = save({"w": torch.arange(6_000_000, dtype=torch.float32)})


def shard(name):
    return save({name: torch.ones(3)})


FILES = {
    "owner/model": {"checkpoints/big.safetensors": BIG},
    "owner/base": {
        "vae.pth": b"vae" * 10,
        "text.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "text-1.safetensors", "b": "text-2.safetensors"}}
        ).encode(),
        "text-1.safetensors": shard("a"),
        "text-2.safetensors": shard("b"),
        "google/umt5-xxl/tokenizer.json": b"{}",
    },
}


class Hub(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as downloads need, and fails on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.cut_after: int | None = None  # bytes of the big file after which connections break
        self.corrupt = False
        self.seen: list[tuple[str, str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        wanted = re.fullmatch(r"/(owner/\w+)/resolve/main/(.+)", self.path.split("?")[0])
        repository, name = wanted.groups() if wanted else ("", "")
        self.server.seen.append((self.command, name, self.headers.get("Range")))
        if repository == "owner/gated":
            return self.refuse(403, "GatedRepo")
        if repository not in FILES:
            return self.refuse(401, "RepoNotFound")
        if name not in FILES[repository]:
            return self.refuse(404, "EntryNotFound")
        return self.send(FILES[repository][name], body)

    def refuse(self, code, reason):
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data, body):
        tag = hashlib.sha256(data).hexdigest()
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        if start and self.server.cut_after is not None:
            return self.refuse(500, "Broken")  # while it is broken, resuming fails too
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if not body:
            return None
        if self.server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        stop = len(data) if len(data) < 10_000 or self.server.cut_after is None else self.server.cut_after
        self.wfile.write(data[start:stop])
        if stop < len(data):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@contextmanager
def running_hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "test-model.toml"
    path.write_text(PRESET)
    return path


def command(hub, preset, *flags, **variables):
    """Run `wanrt weights pull` as a user does."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(preset.parent / "hf"),
        "XDG_DATA_HOME": str(preset.parent / "data"),
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("WANRT_WEIGHTS", None)
    return subprocess.run(
        [sys.executable, "-m", "wanrt", "weights", "pull", str(preset), *flags],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def pull(hub, preset, monkeypatch, tmp_path):
    """`pull_preset` of the test's preset into a directory, in this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("WANRT_WEIGHTS", raising=False)
    return lambda directory, say=None: pull_preset(load_preset(str(preset)), directory, say, hub.address)


def test_pull_fetches_every_part_once(hub, pull, tmp_path):
    directory, said = tmp_path / "weights", []
    files = pull(directory, said.append)
    assert files["transformer"] == directory / "model/checkpoints/big.safetensors"
    assert files["transformer"].read_bytes() == BIG
    for name, content in FILES["owner/base"].items():  # both shards of the index among them
        assert (directory / "base" / name).read_bytes() == content
    assert said[0] == "pulling owner/model:checkpoints/big.safetensors, 24.0 MB"
    assert len(said) == 6
    assert not list(directory.rglob("*.part"))
    before = len(hub.seen)
    assert pull(directory, said.append) == files
    assert len(hub.seen) == before  # nothing is asked for twice


def test_interrupted_pull_is_resumed(hub, preset, tmp_path):
    """The command, broken off by the server, run again: it asks for the rest only."""
    directory = tmp_path / "weights"
    hub.cut_after = 23_000_000  # huggingface_hub writes in pieces of 10 MiB: two of them are kept
    broken = command(hub, preset, "--weights", str(directory))
    assert broken.returncode == 1
    last = broken.stderr.strip().splitlines()[-1]
    assert last.startswith("wanrt: owner/model:checkpoints/big.safetensors: download broke off")
    assert "the same command resumes it" in last
    (partial,) = (directory / "model/checkpoints").glob("*.part")
    have = partial.stat().st_size
    assert 0 < have <= hub.cut_after

    hub.cut_after = None
    hub.seen.clear()
    run = command(hub, preset, WANRT_WEIGHTS=str(directory))
    assert run.returncode == 0, run.stderr
    assert ("GET", "checkpoints/big.safetensors", f"bytes={have}-") in hub.seen
    assert f"24.0 MB, resumed at {have / 1e6:.1f} MB" in run.stderr
    assert f"transformer: {directory}/model/checkpoints/big.safetensors" in run.stdout
    assert (directory / "model/checkpoints/big.safetensors").read_bytes() == BIG
    assert not partial.exists()


def test_two_pulls_do_not_spoil_each_other(pull, tmp_path):
    folder = tmp_path / "weights/model/checkpoints"
    folder.mkdir(parents=True)
    tag = hashlib.sha256(BIG).hexdigest()[:12]
    with (folder / f"big.safetensors.{tag}.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is pulling it"):
            pull(tmp_path / "weights")
    assert pull(tmp_path / "weights")["transformer"].read_bytes() == BIG


def test_a_partial_file_that_is_too_long_is_dropped(pull, tmp_path):
    folder = tmp_path / "weights/model/checkpoints"
    folder.mkdir(parents=True)
    tag = hashlib.sha256(BIG).hexdigest()[:12]
    (folder / f"big.safetensors.{tag}.part").write_bytes(BIG + b"more")
    assert pull(tmp_path / "weights")["transformer"].read_bytes() == BIG


def test_damaged_download_is_dropped(hub, pull, tmp_path):
    hub.corrupt = True
    with pytest.raises(RunError, match="SHA-256 differs"):
        pull(tmp_path / "weights")
    assert not [p for p in (tmp_path / "weights").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("owner/model:", "owner/absent:"), "not on the hub"),
        (("checkpoints/big", "checkpoints/absent"), "not on the hub"),
        (("owner/model:", "owner/gated:"), "access must be granted"),
        (('transformer  = "owner/model', 'spare  = "owner/model'), "no hub source for its transformer"),
    ],
)
def test_refusals_are_one_line(pull, preset, tmp_path, change, said):
    preset.write_text(PRESET.replace(*change))
    with pytest.raises(WeightsError, match=said) as caught:
        pull(tmp_path / "weights")
    assert "\n" not in str(caught.value)


def test_no_hub_at_all(hub, pull, tmp_path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RunError, match="download broke off"):
        pull(tmp_path / "weights")


def test_embedded_weights_are_not_pulled(tmp_path):
    with pytest.raises(WeightsError, match="come with wanrt"):
        pull_preset(load_preset("wan-tiny"), tmp_path)


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'wanrt\[hub\]'"):
        pull_file(HubFile("a/b", "c"), tmp_path)


def test_a_full_disk_is_said_before_the_transfer(pull, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(OutputError, match=r"0\.0 GB free, 0\.0 GB needed"):
        pull(tmp_path / "weights")


def test_an_unwritable_directory(pull, tmp_path):
    (tmp_path / "weights").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be made"):
        pull(tmp_path / "weights")
