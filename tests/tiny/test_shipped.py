"""The weights in the wheel: they load strictly, fit their budget, and their videos are right."""

from __future__ import annotations

import pytest
import torch

from wanrt.script import load_preset
from wanrt.tiny import transformer_training, vae_training
from wanrt.tiny.evaluate import Models, Shot, film, windows
from wanrt.tiny.judge import load_judge, view
from wanrt.tiny.scenes import ATTRIBUTES
from wanrt.tiny.transformer_training import load_models
from wanrt.tiny.vae_training import load_vae, measure_vae
from wanrt.tiny.world import World

WHEEL_LIMIT = 40e6  # bytes of everything the embedded model ships


def test_the_assets_fit_the_wheel(assets):
    assert sum(f.stat().st_size for f in assets.iterdir()) < WHEEL_LIMIT


def test_the_preset_describes_the_shipped_models():
    preset = load_preset("wan-tiny")
    assert preset.transformer_config() == transformer_training.TRANSFORMER_CONFIG
    assert preset.text_config() == transformer_training.TEXT_CONFIG
    assert preset.vae_config().base_dim == vae_training.VAE_CONFIG.base_dim
    assert preset.steps == transformer_training.STEPS


def test_heads_and_ffn_split_by_four():
    config = transformer_training.TRANSFORMER_CONFIG
    assert config.num_heads % 4 == 0
    assert config.ffn_dim % 4 == 0


def test_the_weights_load_strictly(assets, judge_file):
    vae, (transformer, text) = load_vae(assets / "vae.safetensors"), load_models(assets)
    load_judge(judge_file)
    for model in (vae, transformer, text):
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_the_vae_reconstructs_held_out_clips(assets):
    found = measure_vae(load_vae(assets / "vae.safetensors"), World(), count=8, frames=5)
    assert found["whole"] >= 32
    assert found["box"] >= 27


@pytest.mark.slow
def test_videos_show_what_the_prompts_say(assets, judge_file):
    torch.manual_seed(0)
    models = Models(*load_models(assets), load_vae(assets / "vae.safetensors"), assets / "tokenizer.json")
    wanted = [("ball", "red", "bouncing", "night"), ("star", "green", "spinning", "desert")]
    prompts = ["a red ball bouncing over a blue night sky", "a green star spinning in the desert"]
    kept = film(models, [prompts], Shot(5, half=False), 3, {1, 2, 3, 4})
    logits = load_judge(judge_file)(view(windows(kept, 1, 4)))
    for i, scene in enumerate(wanted):
        assert [v[int(logits[k][i].argmax())] for k, v in ATTRIBUTES.items()] == list(scene)
