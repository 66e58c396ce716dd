"""The UMT5 encoder against transformers' UMT5EncoderModel, and its precision rules."""

import dataclasses

import pytest
import torch

from wanrt.models.text_encoder import (
    TextEncoderConfig,
    UMT5Encoder,
    clamp_fp16,
    encode_prompts,
    relative_position_buckets,
)

SMALL = TextEncoderConfig(
    vocab=97, dim=64, attn_dim=48, ffn_dim=96, num_heads=4, num_layers=3, num_buckets=32
)
HF_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def random_encoder(config: TextEncoderConfig = SMALL, scale: float = 1.0) -> UMT5Encoder:
    torch.manual_seed(0)
    encoder = UMT5Encoder(config).eval()
    for name, p in encoder.named_parameters():
        std = 0.5 if "norm" in name or "pos_embedding" in name else p.shape[-1] ** -0.5
        p.data = torch.randn_like(p) * std * scale + (1.0 if "norm" in name else 0.0)
    return encoder


def hf_copy(encoder: UMT5Encoder):
    from transformers import UMT5Config, UMT5EncoderModel

    c = encoder.config
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=c.vocab,
            d_model=c.dim,
            d_kv=c.attn_dim // c.num_heads,
            d_ff=c.ffn_dim,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            relative_attention_num_buckets=c.num_buckets,
            layer_norm_epsilon=c.eps,
            dropout_rate=0.0,
        )
    ).eval()
    state = {"shared.weight": encoder.token_embedding.weight}
    state["encoder.embed_tokens.weight"] = encoder.token_embedding.weight
    state["encoder.final_layer_norm.weight"] = encoder.norm.weight
    for i, block in enumerate(encoder.blocks):
        for ours, theirs in HF_NAMES.items():
            for leaf, value in block.get_submodule(ours).named_parameters():
                state[f"encoder.block.{i}.{theirs}.{leaf}"] = value
    model.load_state_dict(state, strict=True)
    return model


def batch(length: int = 40, vocab: int = SMALL.vocab) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (3, length), generator=generator)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate((length, length // 2, 1)):
        mask[row, :tokens] = 1
    return ids, mask


@pytest.mark.parametrize("length", [1, 40, 300])
@torch.no_grad()
def test_equals_transformers(length):
    encoder = random_encoder()
    ids, mask = batch(length)
    want = hf_copy(encoder)(input_ids=ids, attention_mask=mask).last_hidden_state
    got = encoder(ids, mask)
    keep = mask.bool()
    assert (got - want)[keep].abs().max() <= 1e-4 * want[keep].abs().max()


def test_buckets_equal_transformers():
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    hf = hf_copy(random_encoder()).encoder.block[0].layer[0].SelfAttention
    assert isinstance(hf, UMT5Attention)
    positions = torch.arange(512)
    want = hf._relative_position_bucket(positions[None, :] - positions[:, None])
    assert relative_position_buckets(512, 32, torch.device("cpu")).equal(want)


@torch.no_grad()
def test_padding_never_reaches_the_tokens():
    encoder = random_encoder()
    ids, mask = batch()
    other = torch.where(mask.bool(), ids, (ids + 13) % SMALL.vocab)
    keep = mask.bool()
    assert encoder(ids, mask)[keep].equal(encoder(other, mask)[keep])


def test_names_and_shapes_of_umt5_xxl():
    with torch.device("meta"):
        encoder = UMT5Encoder(TextEncoderConfig())
    shapes = {name: tuple(t.shape) for name, t in encoder.state_dict().items()}
    assert len(shapes) == 1 + 24 * 10 + 1
    assert sum(t.numel() for t in encoder.parameters()) == 5_680_910_336
    assert shapes["token_embedding.weight"] == (256384, 4096)
    assert shapes["blocks.23.ffn.gate.0.weight"] == (10240, 4096)
    assert shapes["blocks.0.pos_embedding.embedding.weight"] == (32, 64)


# Twice what this case measures (0.0076 and 0.00099), which is also what Wan2.1's own module measures.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)])
@torch.no_grad()
def test_half_precision_stays_near_fp32(dtype, bound):
    torch.manual_seed(0)
    encoder = UMT5Encoder(SMALL)
    ids, mask = batch()
    keep = mask.bool()
    want = encoder(ids, mask)[keep]
    got = encoder.to(dtype)(ids, mask)[keep]
    assert got.dtype == dtype
    assert (got.float() - want).norm() <= bound * want.norm()


@torch.no_grad()
def test_fp16_overflow_is_clamped():
    encoder = random_encoder().half()
    encoder.blocks[0].ffn.fc2.weight.mul_(20000)
    ids, mask = batch()
    hidden = encoder.token_embedding(ids)
    buckets = relative_position_buckets(ids.shape[1], 32, ids.device)
    raw = hidden + encoder.blocks[0].ffn(encoder.blocks[0].norm2(hidden))
    assert raw.isinf().any()  # the case is real
    clamped = encoder.blocks[0](hidden, buckets, (mask != 0)[:, None, None, :])
    assert clamped.isfinite().all()
    assert encoder(ids, mask)[mask.bool()].isfinite().all()


def test_clamp_fp16_equals_wan():
    limit = torch.finfo(torch.float16).max
    quiet = torch.tensor([limit, -limit, 1.0], dtype=torch.float16)
    assert clamp_fp16(quiet).equal(quiet)
    loud = torch.tensor([float("inf"), -float("inf"), limit, 1.0], dtype=torch.float16)
    cut = limit - 1000
    assert clamp_fp16(loud).equal(torch.tensor([cut, -cut, cut, 1.0], dtype=torch.float16))
    single = torch.tensor([float("inf")])
    assert clamp_fp16(single) is single


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_compile_fullgraph(dtype):
    encoder = random_encoder(dataclasses.replace(SMALL, num_layers=1)).to(dtype)
    ids, mask = batch(16)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    keep = mask.bool()
    torch.testing.assert_close(compiled(ids, mask)[keep], encoder(ids, mask)[keep])


def test_gradients_reach_every_parameter():
    encoder = random_encoder()
    ids, mask = batch()
    encoder(ids, mask)[mask.bool()].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


class FakeTokenizer:
    """Two prompts: three tokens, and one that was cut."""

    text_len = 8

    def __call__(self, prompts):
        mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8])
        return torch.arange(16).view(2, 8) * mask, mask, [False, True]


def test_encode_prompts_zeroes_padding_and_warns(caplog):
    encoder = random_encoder()
    with caplog.at_level("WARNING", logger="wanrt.models"):
        out = encode_prompts(encoder, FakeTokenizer(), ["short", "a prompt that is far too long"])
    assert out.shape == (2, 8, SMALL.dim)
    assert not out.requires_grad
    assert out[0, 3:].eq(0).all()
    assert out[0, :3].ne(0).all()
    assert [r.getMessage() for r in caplog.records] == [
        "prompt cut at 8 tokens: a prompt that is far too long..."
    ]


@torch.no_grad()
def test_encode_prompts_zeroes_padding_that_holds_nan():
    encoder = random_encoder()
    encoder.token_embedding.weight[0] = float("nan")  # id of the padding in FakeTokenizer
    encoder.token_embedding.weight[1:] = 1.0
    tokenizer = FakeTokenizer()
    out = encode_prompts(encoder, tokenizer, ["short", "long"])
    assert out[0, 3:].eq(0).all()


@pytest.mark.parametrize("bad", [{"attn_dim": 50}, {"num_buckets": 6}])
def test_config_refuses(bad):
    with pytest.raises(ValueError, match=r"num_heads|num_buckets"):
        dataclasses.replace(SMALL, **bad)
