"""Name maps against the names that diffusers' and transformers' own modules produce."""

import random

import pytest
import torch

from wanrt.weights.names import (
    Kind,
    Naming,
    from_original,
    identify_names,
    other_naming,
    to_original,
    unwrap_name,
    unwrap_names,
)


def diffusers_transformer_names():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=2, num_layers=3, ffn_dim=64)
    return list(model.state_dict())


def diffusers_vae_names(num_res_blocks=2):
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=8, num_res_blocks=num_res_blocks)
    return list(model.state_dict())


def umt5_names():
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
        )
    return list(model.state_dict())


CASES = {
    Kind.TRANSFORMER: diffusers_transformer_names,
    Kind.VAE: diffusers_vae_names,
    Kind.TEXT_ENCODER: umt5_names,
}


@pytest.mark.parametrize("kind", CASES)
def test_foreign_names_become_original_and_return(kind):
    names = CASES[kind]()
    naming = other_naming(kind)
    assert identify_names(names) == (kind, naming)
    original = to_original(names, kind, naming)
    assert identify_names(original) == (kind, Naming.ORIGINAL)
    back = from_original(original, kind, naming)
    assert back == original if kind is not Kind.TEXT_ENCODER else set(back.values()) <= set(names)
    assert set(names) - set(back.values()) <= {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize("num_res_blocks", [1, 2, 3])
def test_vae_depth_is_read_from_the_names(num_res_blocks):
    names = diffusers_vae_names(num_res_blocks)
    original = to_original(names, Kind.VAE, Naming.DIFFUSERS)
    assert f"decoder.upsamples.{num_res_blocks + 1}.resample.1.weight" in original
    assert from_original(original, Kind.VAE, Naming.DIFFUSERS) == original


def test_known_pairs():
    names = to_original(diffusers_vae_names(), Kind.VAE, Naming.DIFFUSERS)
    assert (
        names["decoder.upsamples.4.shortcut.weight"] == "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"
    )
    assert names["encoder.downsamples.8.time_conv.bias"] == "encoder.down_blocks.8.time_conv.bias"
    assert names["decoder.middle.1.to_qkv.weight"] == "decoder.mid_block.attentions.0.to_qkv.weight"
    names = to_original(diffusers_transformer_names(), Kind.TRANSFORMER, Naming.DIFFUSERS)
    assert names["blocks.2.norm3.weight"] == "blocks.2.norm2.weight"
    assert names["head.modulation"] == "scale_shift_table"


def test_embedding_under_either_of_its_two_names():
    names = umt5_names()
    for drop in ("shared.weight", "encoder.embed_tokens.weight"):
        kept = [name for name in names if name != drop]
        original = to_original(kept, Kind.TEXT_ENCODER, Naming.TRANSFORMERS)
        assert original["token_embedding.weight"] in kept


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.blocks.0.self_attn.q.weight",
        "module.blocks.0.self_attn.q.weight",
        "_orig_mod.blocks.0.self_attn.q.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight",
        "module.model._orig_mod._fsdp_wrapped_module.blocks.0.self_attn.q.weight",
        "generator.model.blocks.0._checkpoint_wrapped_module.self_attn.q.weight",
        "model.diffusion_model.blocks.0.self_attn.q.weight",
        "blocks.0.self_attn.q.weight",
    ],
)
def test_unwrap(wrapped):
    assert unwrap_name(wrapped) == "blocks.0.self_attn.q.weight"


def test_unwrap_any_pile_of_wrappers():
    rng = random.Random(0)
    names = list(to_original(diffusers_vae_names(), Kind.VAE, Naming.DIFFUSERS))
    for _ in range(50):
        prefix = "".join(
            rng.choice(["model.", "module.", "_orig_mod.", "_fsdp_wrapped_module."])
            for _ in range(rng.randint(0, 4))
        )
        assert unwrap_names(prefix + n for n in names) == {n: prefix + n for n in names}


def test_two_names_that_become_one_are_refused():
    with pytest.raises(ValueError, match="twice"):
        unwrap_names(["model.x.weight", "module.x.weight"])


def test_foreign_name_has_no_counterpart():
    with pytest.raises(KeyError, match="nonsense"):
        from_original(["nonsense.weight"], Kind.TRANSFORMER, Naming.DIFFUSERS)
    # On the way in it keeps its own name, so that the strict check lists it.
    assert to_original(["nonsense"], Kind.TRANSFORMER, Naming.DIFFUSERS) == {"nonsense": "nonsense"}


@pytest.mark.parametrize(
    "names", [[], ["a"], ["decoder.conv1.weight"], ["blocks.0.attn.q.weight"], ["encoder.0.weight"]]
)
def test_unknown(names):
    assert identify_names(names)[0] is Kind.UNKNOWN
