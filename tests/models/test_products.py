"""Joined projections and the GELU inside its product, against the model as it was."""

import copy

import pytest
import torch
from torch import nn

from wanrt.models.fp8 import apply_fp8, dequantised_product
from wanrt.models.products import LinearGelu, add_onto_residuals, fuse_gelu, join_projections
from wanrt.models.transformer import CachePolicy, KVCache, Pass

SIZE = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 3}


def draw(*shape, seed=0, like=None):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x if like is None else x.to(like.device)


def stream(model, policy=CachePolicy.RECOMPUTE):
    """Velocities of a chunk without context and of one with; the pass between them takes keys and values only."""
    like = model.patch_embedding.weight
    cache = KVCache.allocate(
        model.config,
        policy=policy,
        frames=3,
        sink=int(policy is CachePolicy.SINK),
        grid=(4, 6),
        device=like.device,
        dtype=like.dtype,
    )
    text = model.embed_text(draw(1, 5, 20, like=like))
    latents = draw(1, 16, 3, 8, 12, seed=1, like=like)
    noisy, clean = (torch.full((1, 3), t, device=like.device) for t in (700.0, 0.0))
    first = model(latents, noisy, text, cache, pass_=Pass.DENOISE)
    keeping = Pass.CONTEXT if policy is CachePolicy.RECOMPUTE else Pass.COMMIT
    model(latents, clean, text, cache, pass_=keeping)
    second = model(
        latents.flip(2), noisy, text, cache, pass_=Pass.DENOISE, bias=torch.tensor(0.3).log().to(like.device)
    )
    return torch.cat((first, second), dim=2)


def error(got, want):
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("policy", CachePolicy)
def test_joined_projections_are_the_same_function(make_transformer, policy):
    model = make_transformer(**SIZE)
    want = stream(model, policy)
    assert join_projections(model) == 3
    assert error(stream(model, policy), want) < 1e-6


def test_parameters_keep_names_and_values_and_share_memory(make_transformer):
    model = make_transformer(**SIZE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = sum(p.numel() for p in model.parameters())
    join_projections(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(p.numel() for p in model.parameters()) == numbers
    (product,) = model.blocks[0].self_attn.joined
    model.blocks[0].self_attn.k.weight.data.zero_()
    assert product.weight[64:128].eq(0).all()
    assert product.weight[:64].ne(0).any()


def test_products_in_fp8_are_joined_bit_for_bit(make_transformer):
    model = make_transformer(**SIZE)
    apply_fp8(model, product=dequantised_product)
    want = stream(model)
    assert join_projections(model) == 3
    assert error(stream(model), want) < 1e-6
    assert fuse_gelu(model) == 0, "its GELU quantises"


def test_what_differs_in_form_stays_apart(make_transformer):
    model = make_transformer(**SIZE)
    model.blocks[1].self_attn.v = nn.Linear(64, 64, bias=False)
    assert join_projections(model) == 2
    assert model.blocks[1].self_attn.joined == ()


def test_gelu_is_put_inside_the_product(make_transformer):
    model = make_transformer(**SIZE)
    names = model.state_dict().keys()
    want = stream(model)
    assert fuse_gelu(model) == 3
    assert model.state_dict().keys() == names
    assert isinstance(model.blocks[0].ffn[0], LinearGelu)
    # on a CPU PyTorch's fused product takes the erf GELU: the test of what CUDA computes is below
    assert error(stream(model), want) < 1e-2


@pytest.mark.parametrize("policy", CachePolicy)
def test_product_onto_the_residual_is_the_same_function(make_transformer, policy):
    model = make_transformer(**SIZE)
    want = stream(model, policy)
    assert add_onto_residuals(model) == 3
    assert error(stream(model, policy), want) < 1e-6
    torch.nn.init.normal_(model.blocks[1].cross_attn.o.bias)
    assert error(stream(model, policy), want) > 1e-3, "the bias counts"


def test_product_that_is_no_plain_one_gives_an_update(make_transformer):
    model = make_transformer(**SIZE)
    apply_fp8(model, product=dequantised_product)
    assert add_onto_residuals(model) == 0
    assert add_onto_residuals(make_transformer(**SIZE, cross_attn_norm=False)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_gelu_in_the_product_is_no_less_exact(dtype):
    layer = nn.Linear(256, 512)
    x = draw(1, 300, 256)
    exact = nn.functional.gelu(layer.double()(x.double()), approximate="tanh")
    layer, x = layer.to("cuda", dtype), x.to("cuda", dtype)
    apart = nn.functional.gelu(layer(x), approximate="tanh")
    assert error(LinearGelu.of(layer)(x), exact) <= 1.05 * error(apart, exact)


@pytest.mark.gpu
@torch.no_grad()
def test_fewer_products_lose_no_precision(make_transformer):
    """Error against fp32 on the CPU, next to that of the model as it was."""
    model = make_transformer(**SIZE)
    exact = stream(model)
    model.to("cuda", torch.bfloat16)
    limit = 1.1 * error(stream(model), exact)
    fewer = copy.deepcopy(model)
    join_projections(fewer)
    fuse_gelu(fewer)
    add_onto_residuals(fewer)
    assert error(stream(fewer), exact) <= limit < 0.05
