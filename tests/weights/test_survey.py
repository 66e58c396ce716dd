"""`wanrt weights check` and `list`: what files are, what they fit, what is missing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from wanrt.cli import app
from wanrt.errors import WeightsError
from wanrt.models.text_encoder import UMT5Encoder
from wanrt.models.transformer import WanTransformer
from wanrt.models.vae import WanVae
from wanrt.script.preset import load_preset
from wanrt.weights.loading import build_on_meta
from wanrt.weights.survey import readiness, survey

TINY = load_preset("wan-tiny")


def wanrt(arguments):
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as done:
        app.run(arguments)
    return done.value.code


def save_zeros(module, path):
    state = build_on_meta(module).state_dict()
    save_file({n: torch.zeros(t.shape, dtype=torch.float16) for n, t in state.items()}, path)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory with wan-tiny's transformer and text encoder, and a stranger."""
    monkeypatch.setenv("WANRT_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_cache"))
    path = tmp_path / "weights"
    path.mkdir()
    save_zeros(lambda: WanTransformer(TINY.transformer_config()), path / "mystery.pt")
    save_zeros(lambda: UMT5Encoder(TINY.text_config()), path / "text_encoder.safetensors")
    save_file({"a": torch.ones(2)}, path / "stranger.safetensors")
    return path


def test_files_are_named_by_content(directory):
    held = {item.path: item for item in survey(directory)}
    assert set(held) == {"mystery.pt", "text_encoder.safetensors", "stranger.safetensors"}
    assert held["mystery.pt"].what.startswith("Wan transformer")
    assert held["mystery.pt"].what.endswith("(dim 320, 8 layers), 12.9M float16")
    assert held["mystery.pt"].fits == ("wan-tiny (transformer, by its sizes)",)
    assert held["text_encoder.safetensors"].fits == ("wan-tiny (text encoder)",)
    assert held["stranger.safetensors"].what == "unknown tensors, 0.0M float32"
    assert not any(item.error for item in held.values())


def test_damaged_files_say_what_is_wrong(directory):
    (directory / "cut.safetensors").write_bytes((directory / "mystery.pt").read_bytes()[:-100])
    (directory / "tokenizer.json").write_text("{}")
    held = {item.path: item.error for item in survey(directory)}
    assert "damaged safetensors file" in held["cut.safetensors"]
    assert "not a Hugging Face tokenizer.json" in held["tokenizer.json"]
    assert held["mystery.pt"] is None


def test_deep_finds_nan(directory):
    path = directory / "vae.safetensors"
    state = {
        n: torch.zeros(t.shape)
        for n, t in build_on_meta(lambda: WanVae(TINY.vae_config())).state_dict().items()
    }
    state["decoder.head.2.bias"][1] = float("nan")
    save_file(state, path)
    assert not any(item.error for item in survey(directory))
    (bad,) = [item for item in survey(directory, deep=True) if item.error]
    assert (bad.path, bad.error.split(";")[0]) == (
        "vae.safetensors",
        "NaN or Inf in 1 tensors: decoder.head.2.bias",
    )


def test_one_file(directory):
    (held,) = survey(directory / "mystery.pt")
    assert held.path == str(directory / "mystery.pt")


def test_nothing_there(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        survey(tmp_path / "absent")
    with pytest.raises(WeightsError, match="no checkpoint in it"):
        survey(tmp_path)


def test_a_file_of_the_right_name_and_other_sizes_is_not_ready(directory):
    (directory / "mystery.pt").rename(directory / "krea-realtime-video-14b.safetensors")
    krea = load_preset("krea-14b")
    by_name = readiness(krea, directory)
    assert "transformer" not in by_name.missing
    assert by_name.unfit == ()
    looked = readiness(krea, directory, survey(directory))
    assert looked.unfit == ("transformer",)
    path = directory / "krea-realtime-video-14b.safetensors"
    assert looked.advice == f"transformer of other sizes: {path}"
    assert readiness(TINY, directory, survey(directory)).unfit == ()


def test_readiness(directory):
    ready = readiness(load_preset("longlive-1.3b"), directory)
    assert ready.missing == ("transformer", "lora", "vae", "text_encoder", "tokenizer")
    assert ready.advice.endswith("; wanrt weights pull longlive-1.3b")
    assert "text_encoder" in readiness(TINY, directory).found


def test_command_check(directory, capsys):
    assert wanrt(["weights", "check", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "mystery.pt: Wan transformer" in out
    assert "    fits wan-tiny (transformer, by its sizes)" in out
    assert (
        "krea-14b           missing transformer, vae, text encoder, tokenizer; wanrt weights pull krea-14b"
        in out
    )
    assert wanrt(["weights", "check", str(directory), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {item["path"] for item in data["files"]} == {
        "mystery.pt",
        "text_encoder.safetensors",
        "stranger.safetensors",
    }
    assert {item["preset"] for item in data["presets"]} >= {"krea-14b", "wan-tiny"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file or directory"),
        ("empty", "no checkpoint in it"),
        (b"garbage", "1 of 1 files cannot be used: x.safetensors"),
        (b"PK\x03\x04garbage", "1 of 1 files cannot be used: x.safetensors"),
    ],
)
def test_command_check_refuses_in_one_line(content, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANRT_WEIGHTS", str(tmp_path / "nowhere"))
    directory = tmp_path / "weights"
    if content is not None:
        directory.mkdir()
    if isinstance(content, bytes):
        (directory / "x.safetensors").write_bytes(content)
    assert wanrt(["weights", "check", str(directory)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_command_list(directory, capsys):
    assert wanrt(["weights", "list", "--weights", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "krea-14b: missing transformer, vae, text encoder, tokenizer; wanrt weights pull krea-14b" in out
    assert out.splitlines()[-1].startswith(f"searched: {directory}, ")
    assert wanrt(["weights", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == []


def test_command_convert(directory, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    assert (
        wanrt(
            [
                "weights",
                "convert",
                str(directory / "mystery.pt"),
                str(target),
                "--names",
                "diffusers",
                "--dtype",
                "bf16",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.endswith("(dim 320, 8 layers), 12.9M bfloat16, diffusers names\n")
    assert wanrt(["weights", "convert", str(directory / "mystery.pt"), str(target)]) == 1
    assert "--force overwrites it" in capsys.readouterr().err
    assert wanrt(["weights", "convert", str(directory / "stranger.safetensors"), str(target)]) == 2
    assert wanrt(["weights", "convert", str(directory / "mystery.pt"), str(target), "--names", "x"]) == 2


@pytest.mark.parametrize("wrong", ["text_encoder.safetensors", "stranger.safetensors"])
def test_wrong_weights_for_the_preset_end_a_render_in_one_line(wrong, directory, tmp_path, capsys):
    """Through the whole command: the transformer given is something else."""
    out = tmp_path / "x.mp4"
    assert (
        wanrt(["render", "a red ball", "-o", str(out), "--weights", str(directory / wrong), "--quiet"]) == 2
    )
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()
