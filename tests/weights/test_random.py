"""Random weights: seeded, the same by name, and at scales that keep activations alive."""

import math

import pytest
import torch

from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
from wanrt.models.text_encoder import TextEncoderConfig, UMT5Encoder
from wanrt.models.transformer import TransformerConfig, WanTransformer
from wanrt.models.vae import VaeConfig, WanVae
from wanrt.weights.checkpoint import identify
from wanrt.weights.loading import build_on_meta, fill
from wanrt.weights.names import Kind
from wanrt.weights.precision import stored_dtype
from wanrt.weights.random import RandomSource, random_weights


def meta(zoo, kind):
    model = zoo.model(kind)
    return build_on_meta(lambda: type(model)(zoo.configs[kind]))


@pytest.mark.parametrize("kind", [Kind.TRANSFORMER, Kind.VAE, Kind.TEXT_ENCODER])
def test_same_seed_same_weights(kind, zoo):
    one, two, other = (random_weights(meta(zoo, kind), seed, dtype=torch.float32) for seed in (1, 1, 2))
    for name, tensor in one.state_dict().items():
        assert tensor.equal(two.state_dict()[name])
        if tensor.std() > 0:
            assert not tensor.equal(other.state_dict()[name])
    assert not one.training


def test_a_tensor_depends_on_its_name_alone(zoo):
    whole = random_weights(meta(zoo, Kind.TEXT_ENCODER), 3, dtype=torch.float32).state_dict()
    shapes = {name: tuple(t.shape) for name, t in reversed(whole.items())}
    source = RandomSource(shapes, 3, dtype=torch.float32)
    for name in reversed(list(shapes)):
        assert source.read(name).equal(whole[name])
    index = (slice(8, 16), slice(None))
    assert source.read("blocks.0.attn.q.weight", index).equal(whole["blocks.0.attn.q.weight"][index])


def test_a_rank_draws_its_slice_of_the_same_weights(zoo):
    whole = random_weights(meta(zoo, Kind.TEXT_ENCODER), 3, dtype=torch.float32).state_dict()
    shapes = {name: tuple(t.shape) for name, t in whole.items()}

    def second_half(_, shape):
        return (slice(shape[0] // 2, shape[0]), *[slice(None)] * (len(shape) - 1))

    rank = meta(zoo, Kind.TEXT_ENCODER)
    for owner in rank.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, torch.nn.Parameter(p[second_half("", p.shape)]))
    checkpoint = identify(RandomSource(shapes, 3, dtype=torch.float32))
    fill(rank, checkpoint, "cpu", torch.float32, slicer=second_half)
    for name, tensor in rank.state_dict().items():
        assert tensor.equal(whole[name][second_half("", whole[name].shape)])


def test_dtypes_follow_the_model(zoo):
    model = random_weights(meta(zoo, Kind.TRANSFORMER), 0, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype is stored_dtype(Kind.TRANSFORMER, name, torch.bfloat16)


@torch.no_grad()
def test_text_encoder_stays_alive_through_24_layers():
    config = TextEncoderConfig(vocab=200, dim=256, attn_dim=256, ffn_dim=640, num_heads=4, num_layers=24)
    model = random_weights(build_on_meta(lambda: UMT5Encoder(config)), 0, dtype=torch.float32)
    scale = _hidden_scale(model, model.blocks)
    ids = torch.randint(0, 200, (1, 64))
    out = model(ids, torch.ones_like(ids))
    assert out.isfinite().all()
    assert 0.5 < scale["last"] < 30, scale


@torch.no_grad()
def test_transformer_stays_alive_through_40_layers():
    config = TransformerConfig(dim=256, ffn_dim=690, num_layers=40, num_heads=2, text_dim=64, text_len=16)
    model = random_weights(build_on_meta(lambda: WanTransformer(config)), 0, dtype=torch.float32)
    scale = _hidden_scale(model, model.blocks)
    cache = KVCache.allocate(
        config,
        policy=CachePolicy.RECOMPUTE,
        frames=3,
        chunk=3,
        grid=(4, 6),
        batch=1,
        device="cpu",
        dtype=torch.float32,
    )
    latents = torch.randn(1, 16, 3, 8, 12)
    text = model.embed_text(torch.randn(1, 16, 64))
    velocity = model(latents, torch.full((1, 3), 700.0), text, cache, pass_=Pass.DENOISE)
    assert velocity.isfinite().all()
    assert 0.2 < velocity.std() < 5
    assert 0.5 < scale["last"] < 30, scale
    # Frames differ from each other and from their input: the numbers went through.
    assert (velocity[:, :, 0] - velocity[:, :, 1]).std() > 0.1


@torch.no_grad()
def test_vae_stays_alive():
    model = random_weights(build_on_meta(lambda: WanVae(VaeConfig(base_dim=8))), 0, dtype=torch.float32)
    state = model.decoder_state()
    for _ in range(2):
        pixels = model.decode(torch.randn(1, 16, 1, 6, 8), state)
        assert pixels.isfinite().all()
        assert pixels.std() > 0.05
    assert 0.01 < model.encode_frame(torch.rand(1, 3, 1, 48, 64) * 2 - 1).std() < 100


def _hidden_scale(model, blocks):
    scale = {}
    blocks[-1].register_forward_hook(
        lambda _, __, out: scale.__setitem__("last", math.sqrt(getattr(out, "x", out).square().mean()))
    )
    return scale
