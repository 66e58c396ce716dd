"""LoRA adapters merged while weights are read, against W + alpha/rank B A."""

import pytest
import torch
from safetensors.torch import save_file

from wanrt.errors import WeightsError
from wanrt.weights.convert import convert
from wanrt.weights.loading import load_transformer, open_transformer
from wanrt.weights.names import Kind, Naming, from_original

LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0")
RANK = 4


def adapters(state, layers=LAYERS):
    generator = torch.Generator().manual_seed(3)
    made = {}
    for layer in layers:
        height, width = state[f"{layer}.weight"].shape
        a = torch.randn(RANK, width, generator=generator)
        made[layer] = a, torch.randn(height, RANK, generator=generator) * 0.1
    return made


@pytest.fixture
def base(zoo, tmp_path):
    state = zoo.state(Kind.TRANSFORMER)
    path = tmp_path / "base.pt"
    torch.save(
        {"generator": {f"model.{n}": t for n, t in state.items()}, "generator_ema": {"w": torch.ones(1)}},
        path,
    )
    return path, state


SPELLINGS = {
    "longlive": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft with adapter name": (
        "base_model.model.{}.lora_A.default.weight",
        "base_model.model.{}.lora_B.default.weight",
    ),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
}


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merge(spelling, alpha, base, zoo, tmp_path):
    path, state = base
    down, up = SPELLINGS[spelling]
    made = adapters(state)
    tensors = {}
    for layer, (a, b) in made.items():
        tensors |= {down.format(layer): a, up.format(layer): b}
        if alpha is not None:
            tensors[up.format(layer).split(".lora")[0] + ".alpha"] = torch.tensor(alpha)
    lora = tmp_path / "lora.pt"
    torch.save({"generator_lora": tensors, "critic_lora": {}}, lora)
    model = load_transformer(path, zoo.configs[Kind.TRANSFORMER], dtype=torch.float32, lora=lora).state_dict()
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if layer in made:
            a, b = made[layer]
            tensor = tensor + (alpha / RANK if alpha else 1.0) * (b @ a)
        torch.testing.assert_close(model[name], tensor, atol=1e-6, rtol=1e-6)


def test_diffusers_names_and_slices(base, tmp_path):
    path, state = base
    made = adapters(state)
    names = from_original([f"{layer}.weight" for layer in made], Kind.TRANSFORMER, Naming.DIFFUSERS)
    tensors = {}
    for layer, (a, b) in made.items():
        stem = names[f"{layer}.weight"].removesuffix(".weight")
        tensors |= {f"transformer.{stem}.lora_A.weight": a, f"transformer.{stem}.lora_B.weight": b}
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    checkpoint = open_transformer(path, lora)
    a, b = made[LAYERS[0]]
    whole = state[f"{LAYERS[0]}.weight"] + b @ a
    index = (slice(128, 256), slice(0, 100))
    torch.testing.assert_close(
        checkpoint.read(f"{LAYERS[0]}.weight", index), whole[index], atol=1e-6, rtol=1e-6
    )


def test_a_merged_file_is_not_merged_again(base, tmp_path, caplog):
    path, state = base
    tensors = {}
    for layer, (a, b) in adapters(state).items():
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    merged = convert(open_transformer(path, lora), tmp_path / "merged.safetensors")
    once = load_transformer(path, dtype=torch.float32, lora=lora).state_dict()
    again = load_transformer(merged, dtype=torch.float32, lora=lora).state_dict()
    assert all(again[name].equal(tensor) for name, tensor in once.items())
    assert "already merged with lora.safetensors" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"blocks.9.self_attn.q.lora_A.weight": torch.ones(4, 256)}, "is no layer of"),
        (
            lambda t: t | {"blocks.0.self_attn.k.lora_A.weight": torch.ones(4, 256)},
            "expected lora_A and lora_B",
        ),
        (lambda t: t | {"blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 99)}, "has [256, 256] there"),
        (lambda t: t | {"blocks.0.self_attn.q.weight": torch.ones(2)}, "is no part of a LoRA"),
    ],
)
def test_a_lora_of_something_else(change, said, base, tmp_path):
    path, state = base
    tensors = {}
    for layer, (a, b) in adapters(state).items():
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    lora = tmp_path / "lora.safetensors"
    save_file(change(tensors), lora)
    with pytest.raises(WeightsError) as caught:
        load_transformer(path, lora=lora)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
