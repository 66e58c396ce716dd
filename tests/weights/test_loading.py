"""Checkpoints into modules: every naming, every wrapper, every dtype, strictly."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import save_file

from wanrt.errors import WeightsError
from wanrt.models.fp8 import Fp8Linear, apply_fp8, quantised_weight
from wanrt.models.transformer import WanTransformer
from wanrt.models.vae import VaeConfig, WanVae
from wanrt.weights.checkpoint import identify, open_checkpoint
from wanrt.weights.loading import (
    build_on_meta,
    fill,
    is_finite,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    open_transformer,
)
from wanrt.weights.names import Kind, Naming
from wanrt.weights.precision import stored_dtype
from wanrt.weights.sources import TensorsSource

LOADERS = {Kind.TRANSFORMER: load_transformer, Kind.VAE: load_vae, Kind.TEXT_ENCODER: load_text_encoder}
KINDS = tuple(LOADERS)


def assert_loaded(model, zoo, kind, dtype=torch.float32):
    state = model.state_dict()
    want = zoo.state(kind)
    assert list(state) == list(want)
    for name, tensor in want.items():
        expected = tensor.to(stored_dtype(kind, name, dtype))
        assert state[name].dtype is expected.dtype
        assert state[name].equal(expected), name
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("foreign", [False, True], ids=["original", "other names"])
@pytest.mark.parametrize("writer", ["safetensors", "sharded", "zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_naming_and_format(kind, writer, foreign, zoo, tmp_path):
    state = zoo.foreign_state(kind) if foreign else zoo.state(kind)
    path = tmp_path / "weights"
    match writer:
        case "safetensors":
            save_file({n: t.contiguous() for n, t in state.items()}, path)
        case "sharded":
            path = zoo.shard(state, tmp_path)
        case _:
            torch.save(state, path, _use_new_zipfile_serialization=writer == "zip")
    model = LOADERS[kind](path, zoo.configs[kind], dtype=torch.float32)
    assert_loaded(model, zoo, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_read_from_the_file(kind, zoo, tmp_path):
    path = tmp_path / "x"
    save_file(zoo.state(kind), path)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.kind, checkpoint.naming) == (kind, Naming.ORIGINAL)
    config = zoo.configs[kind]
    if kind is Kind.TRANSFORMER:  # text_len is in no shape
        from dataclasses import replace

        config = replace(config, text_len=512)
    assert checkpoint.config == config
    assert_loaded(LOADERS[kind](path, dtype=torch.float32), zoo, kind)


@pytest.mark.parametrize(
    ("entry", "prefix"),
    [
        (None, "model."),
        (None, "module."),
        (None, "_orig_mod."),
        ("generator", "model."),
        ("generator_ema", "model._fsdp_wrapped_module."),
        ("model", ""),
        ("generator", "module.model._orig_mod."),
        ("state_dict", "model.diffusion_model."),
    ],
)
def test_wrapped_fine_tunes(entry, prefix, zoo, tmp_path):
    state = {prefix + name: t for name, t in zoo.state(Kind.TRANSFORMER).items()}
    path = tmp_path / "fine_tune.pt"
    torch.save({entry: state, "step": 3} if entry else state, path)
    assert_loaded(
        load_transformer(path, zoo.configs[Kind.TRANSFORMER], dtype=torch.float32), zoo, Kind.TRANSFORMER
    )


def test_fsdp_names_inside_the_blocks(zoo, tmp_path):
    state = {
        "model." + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t
        for name, t in zoo.state(Kind.TRANSFORMER).items()
    }
    path = tmp_path / "fsdp.pt"
    torch.save({"generator": state}, path)
    assert_loaded(load_transformer(path, dtype=torch.float32), zoo, Kind.TRANSFORMER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype, zoo, tmp_path):
    path = tmp_path / "x"
    save_file(zoo.state(kind), path)
    assert_loaded(LOADERS[kind](path, zoo.configs[kind], dtype=dtype), zoo, kind, dtype)


def test_loading_tells_how_many_values_are_read(zoo):
    kind, told = Kind.TRANSFORMER, []
    model = build_on_meta(lambda: WanTransformer(zoo.configs[kind]))
    fill(
        model,
        identify(TensorsSource(zoo.state(kind), "memory")),
        "cpu",
        torch.float32,
        done=lambda *a: told.append(a),
    )
    counts, totals = zip(*told, strict=True)
    assert set(totals) == {sum(p.numel() for p in model.parameters())}
    assert len(counts) == len(zoo.state(kind))
    assert list(counts) == sorted(set(counts))
    assert counts[-1] == totals[0]


def test_fp32_parameters_of_the_transformer(zoo):
    kept = {
        n
        for n in zoo.state(Kind.TRANSFORMER)
        if stored_dtype(Kind.TRANSFORMER, n, torch.bfloat16).itemsize == 4
    }
    assert "blocks.0.modulation" in kept
    assert "head.modulation" in kept
    assert "time_projection.1.weight" in kept
    assert "blocks.1.self_attn.norm_q.weight" in kept
    assert not any(".q." in n or "ffn" in n or "text_embedding" in n or "patch" in n for n in kept)


def findings(path, loader, config) -> str:
    with pytest.raises(WeightsError) as caught:
        loader(path, config, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_extra_and_misshapen_are_listed(zoo, tmp_path):
    state = zoo.state(Kind.TRANSFORMER)
    del state["blocks.1.ffn.0.weight"]
    state["img_emb.proj.weight"] = torch.zeros(3, 4)
    state["head.head.bias"] = torch.zeros(5)
    path = tmp_path / "x"
    save_file(state, path)
    message = findings(path, load_transformer, zoo.configs[Kind.TRANSFORMER])
    assert "missing blocks.1.ffn.0.weight [96, 256]" in message
    assert "extra img_emb.proj.weight [3, 4]" in message
    assert "head.head.bias is [5], expected [64]" in message


def test_only_the_first_ten_are_spelled_out(zoo, tmp_path):
    state = {n: t for n, t in zoo.state(Kind.TRANSFORMER).items() if "blocks.1" not in n}
    path = tmp_path / "x"
    save_file(state, path)
    message = findings(path, load_transformer, zoo.configs[Kind.TRANSFORMER])
    assert message.count("missing ") == 10
    assert "and 17 more" in message
    assert "got Wan transformer (dim 256, 1 layers)" in message
    assert "which does not fit Wan transformer (dim 256, 2 layers)" in message


def test_a_foreign_naming_with_an_extra_tensor(zoo, tmp_path):
    state = zoo.foreign_state(Kind.VAE) | {"loss.logvar": torch.zeros(1)}
    path = tmp_path / "x"
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    assert "extra loss.logvar [1]" in findings(path, load_vae, None)


def test_an_original_name_among_diffusers_names_is_not_swallowed(zoo, tmp_path):
    state = zoo.foreign_state(Kind.VAE)
    state["encoder.conv1.weight"] = state["encoder.conv_in.weight"].clone()
    path = tmp_path / "x"
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    assert "encoder.conv1.weight" in findings(path, load_vae, None)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_kind_is_named(kind, zoo, tmp_path):
    path = tmp_path / "x"
    save_file(zoo.state(kind), path)
    for other, loader in LOADERS.items():
        if other is not kind:
            message = findings(path, loader, None)
            assert "got " in message
            assert f"expected a {other}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(value, zoo, tmp_path):
    state = zoo.state(Kind.TEXT_ENCODER)
    state["blocks.1.attn.v.weight"][3, 4] = value
    path = tmp_path / "x"
    save_file(state, path)
    message = findings(path, load_text_encoder, None)
    assert "NaN or Inf in 1 tensors: blocks.1.attn.v.weight" in message


def test_overflow_of_the_target_dtype_is_refused(zoo, tmp_path):
    state = zoo.state(Kind.TEXT_ENCODER)
    state["norm.weight"][0] = 1e30
    path = tmp_path / "x"
    save_file(state, path)
    load_text_encoder(path, dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match="wider dtype"):
        load_text_encoder(path, dtype=torch.float16)


def test_is_finite():
    assert is_finite(torch.ones(3))
    assert is_finite(torch.empty(0))
    assert not is_finite(torch.tensor([1.0, float("nan")]))
    assert not is_finite(torch.tensor([1.0, -float("inf")], dtype=torch.bfloat16))


def test_integer_weights_are_refused(zoo, tmp_path):
    state = zoo.state(Kind.TEXT_ENCODER)
    state["norm.weight"] = torch.ones(48, dtype=torch.int8)
    path = tmp_path / "x"
    save_file(state, path)
    assert "quantised" in findings(path, load_text_encoder, None)


def test_fp8_weights_are_widened(zoo, tmp_path):
    state = zoo.state(Kind.TEXT_ENCODER)
    state["blocks.0.ffn.fc1.weight"] = state["blocks.0.ffn.fc1.weight"].to(torch.float8_e4m3fn)
    path = tmp_path / "x"
    save_file(state, path)
    model = load_text_encoder(path, dtype=torch.bfloat16)
    assert model.blocks[0].ffn.fc1.weight.equal(state["blocks.0.ffn.fc1.weight"].bfloat16())


@pytest.mark.parametrize("seed", range(3))
def test_slices_equal_the_slices_of_the_whole(seed, zoo, tmp_path):
    """A rank of two reads half of every matrix's rows, of the sources that can slice and those that cannot."""
    state = zoo.state(Kind.TEXT_ENCODER)
    path = tmp_path / "x"
    torch.save(state, path) if seed else save_file(state, path)
    rank = seed % 2

    def half_of_rows(name, shape):
        step = shape[0] // 2
        return (slice(rank * step, (rank + 1) * step), *[slice(None)] * (len(shape) - 1))

    def half(tensor):
        return tensor[half_of_rows("", tensor.shape)]

    module = build_on_meta(lambda: type(zoo.model(Kind.TEXT_ENCODER))(zoo.configs[Kind.TEXT_ENCODER]))
    for owner in module.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, torch.nn.Parameter(half(p)))
    fill(module, open_checkpoint(path), "cpu", torch.float32, slicer=half_of_rows)
    for name, tensor in module.state_dict().items():
        assert tensor.equal(half(state[name])), name


def test_taehv_is_known_by_content(tmp_path):
    from wanrt.models.tiny_vae import TinyVae, TinyVaeConfig

    torch.manual_seed(0)
    want = TinyVae(TinyVaeConfig())
    path = tmp_path / "taew2_1.pth"
    torch.save(want.state_dict(), path)
    assert open_checkpoint(path).describe() == "TAEHV tiny VAE, 11.3M float32"
    model = load_vae(path, dtype=torch.float32)
    assert isinstance(model, TinyVae)
    latents = torch.randn(1, 16, 1, 4, 6)
    with torch.no_grad():
        got = model.decode(latents, model.decoder_state())
        assert got.equal(want.eval().decode(latents, want.decoder_state()))


def test_a_cut_taehv_is_one_line(tmp_path):
    path = tmp_path / "taew2_1.pth"
    torch.save(
        {"decoder.1.weight": torch.ones(4, 16, 3, 3), "decoder.3.conv.0.weight": torch.ones(4, 8, 3, 3)}, path
    )
    with pytest.raises(WeightsError, match="TAEHV of a variant"):
        load_vae(path)


def test_latent_statistics_of_the_file_win(zoo, tmp_path):
    mean, std = [0.25] * 16, [3.0] * 16
    path = tmp_path / "vae.safetensors"
    metadata = {"latents_mean": json.dumps(mean), "latents_std": json.dumps(std)}
    save_file(zoo.state(Kind.VAE), path, metadata=metadata)
    for config in (None, zoo.configs[Kind.VAE]):
        model = load_vae(path, config)
        assert model.mean.flatten().tolist() == mean
        assert model.std.flatten().tolist() == std


@pytest.mark.parametrize("text", ["x", "[1, 2]", "{}", "[1e999" + ", 0" * 15 + "]", '["a"]', "[" * 9999])
def test_bad_latent_statistics(text, zoo, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(zoo.state(Kind.VAE), path, metadata={"latents_mean": text})
    with pytest.raises(WeightsError, match=r"latents_mean.* expected a JSON list of 16 numbers") as caught:
        load_vae(path)
    assert "\n" not in str(caught.value)


def test_loaded_weights_can_be_changed_without_touching_the_file(zoo, tmp_path):
    path = tmp_path / "x"
    save_file(zoo.state(Kind.TEXT_ENCODER), path)
    before = path.read_bytes()
    model = load_text_encoder(path, dtype=torch.float32)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert path.read_bytes() == before


def test_tokenizer_of_another_encoder_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    path = tmp_path / "tokenizer.json"
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(97)}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(path))
    for vocab in (100, 128, 399):
        assert load_tokenizer(path, 16, vocab).text_len == 16
    for vocab in (50, 99, 400, 256_384):
        with pytest.raises(WeightsError, match=f"of 100 tokens; the text encoder has {vocab} embeddings"):
            load_tokenizer(path, 16, vocab)


def test_the_public_layouts_are_recognised():
    """Names and sizes of the published checkpoints, from modules of their sizes built on meta."""
    for build, said in (
        (
            lambda: WanTransformer(_config(5120, 13824, 40)),
            "Wan transformer (dim 5120, 40 layers), 14.3B float32",
        ),
        (
            lambda: WanTransformer(_config(1536, 8960, 30)),
            "Wan transformer (dim 1536, 30 layers), 1.4B float32",
        ),
        (lambda: WanVae(VaeConfig()), "Wan VAE (base dim 96), 126.9M float32"),
        (lambda: WanVae(VaeConfig(base_dim=24)), "LightVAE (base dim 24), 8.0M float32"),
    ):
        checkpoint = identify(TensorsSource(build_on_meta(build).state_dict(), "meta"))
        assert checkpoint.describe() == said


def _config(dim, ffn_dim, num_layers):
    from wanrt.models.transformer import TransformerConfig

    return TransformerConfig(dim=dim, ffn_dim=ffn_dim, num_layers=num_layers, num_heads=dim // 128)


MEASURE = """
import sys, threading, time, torch
from wanrt.models.text_encoder import TextEncoderConfig, UMT5Encoder
from wanrt.weights.loading import build_on_meta, is_finite, load_text_encoder

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

build_on_meta(lambda: UMT5Encoder(TextEncoderConfig(vocab=9, dim=8, attn_dim=8, num_heads=2, ffn_dim=8, num_layers=1)))
is_finite(torch.ones(9))
for dtype in (torch.bfloat16, torch.float32):
    peak, done, before = 0, False, anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_text_encoder(sys.argv[1], dtype=dtype)
    done = True
    watcher.join()
    print(max(peak, anonymous()) - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")  # noqa: PTH110
@pytest.mark.parametrize("writer", ["safetensors", "zip"])
def test_memory_is_taken_once(writer, tmp_path):
    """A 119 MB file in bf16: as it is, it stays mapped; converted, there is one copy and never two."""
    from wanrt.models.text_encoder import TextEncoderConfig, UMT5Encoder

    config = TextEncoderConfig(vocab=8192, dim=1024, attn_dim=1024, ffn_dim=2816, num_heads=16, num_layers=4)
    with torch.device("meta"):
        names = UMT5Encoder(config).state_dict()
    state = {n: torch.ones(t.shape, dtype=torch.bfloat16) for n, t in names.items()}
    path = tmp_path / "x"
    save_file(state, path) if writer == "safetensors" else torch.save(state, path)
    command = [sys.executable, "-c", MEASURE, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    mapped, converted = ([int(word) for word in line.split()] for line in run.stdout.splitlines())
    assert mapped[0] <= 0.1 * mapped[1], mapped
    assert converted[0] <= 1.15 * converted[1], converted


def fp8_model(zoo):
    model = build_on_meta(lambda: WanTransformer(zoo.configs[Kind.TRANSFORMER]))
    apply_fp8(model)
    return model


def test_fp8_layers_are_quantised_as_they_are_read(zoo, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file(zoo.state(Kind.TRANSFORMER), path)
    alive = []

    def watched(weight):
        alive.append(weakref.ref(weight))
        assert weight.dtype == torch.float32
        assert sum(ref() is not None for ref in alive) == 1, "one weight in full at a time"
        return quantised_weight(weight)

    monkeypatch.setattr("wanrt.weights.loading.quantised_weight", watched)
    got = fill(fp8_model(zoo), open_transformer(path), "cpu", torch.bfloat16)
    assert len(alive) == 2 * 8
    want = zoo.model(Kind.TRANSFORMER)
    apply_fp8(want)
    state = got.state_dict()
    for name, tensor in want.state_dict().items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
        elif name.endswith("weight_scale"):
            assert torch.equal(state[name], tensor), name
        else:
            assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    assert got.dtype == torch.bfloat16
    assert state["blocks.0.self_attn.q.bias"].dtype == torch.bfloat16


def test_fp8_ranks_quantise_their_slices(zoo, tmp_path):
    path = tmp_path / "x.safetensors"
    state = zoo.state(Kind.TRANSFORMER)
    save_file(state, path)
    name = "blocks.1.ffn.0.weight"
    model = fp8_model(zoo)
    half = Fp8Linear((48, 256), bias=True, device="meta")
    model.set_submodule("blocks.1.ffn.0", half)

    def slicer(parameter, shape):
        return (slice(48, 96), *[slice(None)] * (len(shape) - 1)) if "blocks.1.ffn.0" in parameter else None

    fill(model, open_transformer(path), "cpu", torch.bfloat16, slicer=slicer)
    values, scale = quantised_weight(state[name][48:])
    assert torch.equal(half.weight.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(half.weight_scale, scale)


def test_nan_is_found_before_it_is_quantised(zoo, tmp_path):
    state = zoo.state(Kind.TRANSFORMER)
    state["blocks.0.ffn.0.weight"][3, 5] = torch.nan
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"NaN or Inf in 1 tensors: blocks\.0\.ffn\.0\.weight"):
        fill(fp8_model(zoo), open_transformer(path), "cpu", torch.bfloat16)
