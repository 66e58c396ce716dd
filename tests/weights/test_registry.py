"""From a preset to its files: what is searched, in which order, and what an error says."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanrt.errors import WeightsError
from wanrt.models.transformer import WanTransformer
from wanrt.models.vae import WanVae
from wanrt.script.preset import load_preset
from wanrt.weights.loading import build_on_meta
from wanrt.weights.registry import (
    VARIABLE,
    HubFile,
    data_directory,
    file_names,
    find_parts,
    fits,
    hub_cache,
    resolve,
    search_directories,
    weights_directory,
)

KREA = load_preset("krea-14b")
LONGLIVE = load_preset("longlive-1.3b")
TINY = load_preset("wan-tiny")
BY_HAND = {  # where the README commands of the public projects put the files
    "transformer": "krea-realtime-video-14b.safetensors",
    "vae": "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
    "text_encoder": "Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json",
}


@pytest.fixture
def krea(tmp_path):
    directory = tmp_path / "weights"
    for name in BY_HAND.values():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"")
    return directory


def nowhere(tmp_path):
    return {VARIABLE: str(tmp_path / "nowhere"), "HF_HOME": str(tmp_path / "no_cache")}


def test_files_are_found_where_people_put_them(krea, tmp_path):
    files = resolve(KREA, krea, nowhere(tmp_path))
    for part, name in BY_HAND.items():
        assert getattr(files, part) == krea / name
    assert files.lora is None


def test_the_variable_names_the_directory(krea):
    assert resolve(KREA, None, {VARIABLE: str(krea)}).vae == krea / BY_HAND["vae"]
    assert weights_directory(None, {VARIABLE: str(krea)}) == krea
    assert weights_directory(None, {}) == data_directory()
    assert weights_directory(Path("x"), {VARIABLE: str(krea)}) == Path("x")


def test_the_option_comes_before_the_variable(krea, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "Wan2.1_VAE.pth").write_bytes(b"")
    files = resolve(KREA, other, {VARIABLE: str(krea)})
    assert files.vae == other / "Wan2.1_VAE.pth"
    assert files.transformer == krea / BY_HAND["transformer"]


def test_a_checkpoint_may_be_named_itself(krea, tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"")
    assert resolve(KREA, mine, {VARIABLE: str(krea)}).transformer == mine


def test_missing_parts_are_named_with_the_command(krea, tmp_path):
    (krea / BY_HAND["transformer"]).unlink()
    (krea / BY_HAND["tokenizer"]).unlink()
    with pytest.raises(WeightsError) as caught:
        resolve(KREA, krea, nowhere(tmp_path))
    message = str(caught.value)
    assert "missing transformer (krea-realtime-video-14b.safetensors), tokenizer (tokenizer.json)" in message
    assert str(krea) in message
    assert "wanrt weights pull krea-14b" in message
    assert "vae" not in message
    assert "\n" not in message


def test_the_lora_is_wanted_where_the_preset_has_one(krea, tmp_path):
    with pytest.raises(WeightsError, match=r"lora \(lora.pt\)"):
        resolve(LONGLIVE, krea, nowhere(tmp_path))
    for name in ("models/longlive_base.pt", "models/lora.pt"):
        (krea / name).parent.mkdir(exist_ok=True)
        (krea / name).write_bytes(b"")
    assert resolve(LONGLIVE, krea, nowhere(tmp_path)).lora == krea / "models/lora.pt"


def test_a_merged_transformer_needs_no_lora(krea, tmp_path, caplog):
    base, merged = krea / "longlive_base.pt", krea / "merged.safetensors"
    for path in (base, merged, krea / "lora.pt"):
        path.write_bytes(b"")
    assert resolve(LONGLIVE, base, nowhere(tmp_path)).lora == krea / "lora.pt"
    with caplog.at_level("WARNING", logger="wanrt.weights"):
        files = resolve(LONGLIVE, merged, nowhere(tmp_path))
    assert (files.transformer, files.lora) == (merged, None)
    assert "without the LoRA that goes with longlive_base.pt" in caplog.text


def test_the_hub_cache_is_used(krea, tmp_path):
    (krea / BY_HAND["transformer"]).unlink()
    environ = nowhere(tmp_path) | {"HF_HOME": str(tmp_path / "hf")}
    for age, snapshot in ((10, "aaa"), (0, "bbb"), (20, "ccc")):
        folder = tmp_path / "hf/hub/models--krea--krea-realtime-video/snapshots" / snapshot
        folder.mkdir(parents=True)
        path = folder / "krea-realtime-video-14b.safetensors"
        path.write_bytes(b"")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert resolve(KREA, krea, environ).transformer.parent.name == "bbb"
    assert hub_cache({"HF_HUB_CACHE": "/x"}) == Path("/x")
    assert hub_cache({"HF_HOME": "/x"}) == Path("/x/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match="no such file or directory"):
        search_directories(tmp_path / "absent")


def test_vae_under_any_name_is_known_by_content(krea, tmp_path):
    """A VAE in diffusers names, in a folder of its own, beside files that are something else or damaged."""
    from wanrt.weights.names import Kind, Naming, from_original

    (krea / BY_HAND["vae"]).unlink()
    (krea / "broken.safetensors").write_bytes(b"garbage")
    folder = krea / "some" / "vae"
    folder.mkdir(parents=True)
    small = build_on_meta(lambda: WanVae(load_preset("wan-tiny").vae_config())).state_dict()
    save_file({n: torch.zeros(t.shape) for n, t in small.items()}, folder / "a_small_one.safetensors")
    state = build_on_meta(lambda: WanVae(KREA.vae_config())).state_dict()
    names = from_original(state, Kind.VAE, Naming.DIFFUSERS)
    save_file(
        {names[n]: torch.zeros(t.shape, dtype=torch.float8_e4m3fn) for n, t in state.items()},
        folder / "x.safetensors",
    )
    assert resolve(KREA, krea, nowhere(tmp_path)).vae == folder / "x.safetensors"


def test_a_transformer_is_never_guessed_by_content(tmp_path):
    """The public 1.3B is not causal but has the same tensors as its causal fine-tunes."""
    tensors = build_on_meta(lambda: WanTransformer(TINY.transformer_config())).state_dict()
    save_file({n: torch.zeros(t.shape) for n, t in tensors.items()}, tmp_path / "some.safetensors")
    assert "transformer" not in find_parts(
        TINY.model_copy(update={"weights": KREA.weights}), (tmp_path,), nowhere(tmp_path)
    )


def test_a_transformer_that_would_fit_is_hinted_at(tmp_path):
    preset = TINY.model_copy(update={"weights": KREA.weights})
    tensors = build_on_meta(lambda: WanTransformer(TINY.transformer_config())).state_dict()
    path = tmp_path / "deep" / "some.safetensors"
    path.parent.mkdir()
    save_file({n: torch.zeros(t.shape) for n, t in tensors.items()}, path)
    with pytest.raises(WeightsError, match=rf"if it is the one, --weights {path}"):
        resolve(preset, tmp_path, nowhere(tmp_path))


def test_fits(zoo, tmp_path):
    from wanrt.weights.checkpoint import identify
    from wanrt.weights.sources import TensorsSource

    def checkpoint(module):
        return identify(TensorsSource(build_on_meta(module).state_dict(), tmp_path))

    tiny = checkpoint(lambda: WanTransformer(TINY.transformer_config()))
    krea = checkpoint(lambda: WanTransformer(KREA.transformer_config()))
    assert fits(TINY, "transformer", tiny)
    assert fits(KREA, "transformer", krea)
    assert not fits(KREA, "transformer", tiny)
    assert not fits(KREA, "vae", tiny)
    vae = checkpoint(lambda: WanVae(KREA.vae_config()))
    assert fits(KREA, "vae", vae)
    assert not fits(TINY, "vae", vae)


def test_names_of_the_embedded_model(tmp_path):
    for name in ("transformer.safetensors", "vae.safetensors", "text_encoder.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"")
    assert resolve(TINY, tmp_path, nowhere(tmp_path)).tokenizer == tmp_path / "tokenizer.json"


def test_the_directory_of_all_models_does_not_replace_the_embedded_one(tmp_path):
    (tmp_path / "vae.safetensors").write_bytes(b"of some other model")
    environ = nowhere(tmp_path) | {VARIABLE: str(tmp_path)}
    assert (
        find_parts(TINY, search_directories(None, environ), environ).get("vae")
        != tmp_path / "vae.safetensors"
    )


def test_every_preset_can_be_pulled_or_is_embedded():
    from wanrt.script.preset import preset_names

    for name in preset_names():
        preset = load_preset(name)
        for part, text in preset.weights.hub.items():
            assert HubFile.parse(text).path.endswith(file_names(preset, part)[-1].split("/")[-1])
        assert preset.weights.embedded or preset.weights.hub


@pytest.mark.parametrize(
    "text", ["", "a", "owner/name", "name:path", "a/b/c:d", "a/b:/etc/passwd", "a/b:../x"]
)
def test_bad_hub_sources(text):
    with pytest.raises(WeightsError, match="expected owner/repository:path"):
        HubFile.parse(text)


def test_hub_file_local(tmp_path):
    assert (
        HubFile.parse("Wan-AI/Wan2.1-T2V-1.3B:google/x.json").local(tmp_path)
        == tmp_path / "Wan2.1-T2V-1.3B/google/x.json"
    )
