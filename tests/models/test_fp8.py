"""Products in fp8 put into a transformer, against a naive model that quantises its own inputs in plain PyTorch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from wanrt.models.attention import AttentionBackend
from wanrt.models.fp8 import (
    ALL_BLOCKS,
    Fp8Linear,
    Fp8Plan,
    apply_fp8,
    dequantised_product,
    plan_for,
    product_error,
    scaled_product,
    why_no_fp8,
)
from wanrt.models.transformer import WAN_14B, CachePolicy, KVCache, Pass, WanTransformer
from wanrt_kernels.quant_rows import FP8, quantise_rows

SIZE = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 3}
# Relative by norm. Both quantise the same fp32 numbers, so only last bits of sums differ; where one moves a
# number across a tie, it differs by a step of e4m3fn. Anything else is off by 10^-2 at once.
EXACT = 2e-4
# e4m3fn has 3 bits after the point: errors of 2^-4 / sqrt(3) a number at most and of both factors, through 3 layers
QUANTISED = 0.10


class NaiveLinear(nn.Module):
    """Quantises weight and input itself, row by row, as the definition says, and multiplies what comes back."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = self.round_trip(layer.weight), layer.bias

    @staticmethod
    def round_trip(x):
        top = x.float().abs().amax(-1, keepdim=True)
        values = x.float() * torch.div(torch.tensor(448.0), top)
        return values.clamp(-448, 448).to(FP8).float() * (top / 448)

    def forward(self, x):
        return (self.round_trip(x) @ self.weight.t() + self.bias.float()).to(x.dtype)


def naive(model, plan=ALL_BLOCKS):
    for name, module in list(model.named_modules()):
        if plan.covers(name):
            model.set_submodule(name, NaiveLinear(module))
    return model


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def stream(model, cache, chunks=3):
    """Velocities of a few chunks, context or commit passes between."""
    device, found = model.patch_embedding.weight.device, []
    text = model.embed_text(draw(1, 5, 20, seed=1, device=device))
    h, w = (2 * n for n in cache.grid)
    for chunk in range(chunks):
        if chunk and cache.policy is CachePolicy.RECOMPUTE:
            context = draw(1, 16, 3, h, w, seed=10 + chunk, device=device)
            model(context, torch.zeros(1, 3, device=device), text, cache, pass_=Pass.CONTEXT)
        latents = draw(1, 16, 3, h, w, seed=20 + chunk, device=device)
        times = torch.tensor([[900.0, 500.0, 100.0]], device=device)
        found.append(model(latents, times, text, cache, pass_=Pass.DENOISE))
        if cache.policy is not CachePolicy.RECOMPUTE:
            model(latents, torch.zeros(1, 3, device=device), text, cache, pass_=Pass.COMMIT)
    return torch.cat(found, dim=2)


def error(got, want):
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm())


@pytest.mark.parametrize("policy", CachePolicy)
@torch.no_grad()
def test_the_model_equals_a_naive_one_and_stays_near_fp32(make_transformer, make_cache, policy):
    sink = {"sink": 1} if policy is CachePolicy.SINK else {}
    plain, quantised, oracle = (make_transformer(**SIZE) for _ in range(3))
    assert apply_fp8(quantised, product=dequantised_product) == 3 * 8
    made = [stream(m, make_cache(m, policy, **sink)) for m in (plain, quantised, naive(oracle))]
    assert error(made[1], made[2]) <= EXACT
    assert 1e-3 < error(made[1], made[0]) <= QUANTISED


@torch.no_grad()
def test_torch_multiplies_the_same_numbers(make_transformer, make_cache):
    """The op itself runs on a CPU too: same model in bf16, both products."""
    made = []
    for product in (scaled_product, dequantised_product):
        model = make_transformer(**SIZE).to(torch.bfloat16)
        apply_fp8(model, product=product)
        made.append(stream(model, make_cache(model, dtype=torch.bfloat16)))
    assert error(*made) <= 2e-2


def test_one_quantisation_serves_q_k_and_v(make_transformer, make_cache, monkeypatch):
    model, calls = make_transformer(**SIZE), []
    apply_fp8(model, product=dequantised_product)
    monkeypatch.setattr("wanrt.models.fp8.quantise_rows", lambda x: calls.append(x.shape) or quantise_rows(x))
    stream(model, make_cache(model), chunks=1)
    assert len(calls) == 2 * SIZE["num_layers"], "only the outputs of self- and cross-attention"


def test_what_is_planned_is_what_becomes_fp8(make_transformer):
    model = make_transformer(**SIZE)
    apply_fp8(model)
    got = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip  # noqa: E501
    assert got == {f"blocks.{i}.{name}" for i in range(3) for name in names}
    assert all(p.dtype != FP8 for name, p in model.named_parameters() if not name.endswith(".weight"))


@torch.no_grad()
def test_a_plan_may_leave_blocks_and_layers_out(make_transformer, make_cache):
    plan = Fp8Plan((r"blocks\.1\.self_attn\.[qkvo]", r"blocks\.1\.ffn\.2", r"blocks\.2\.ffn\.0"))
    model = make_transformer(**SIZE)
    assert apply_fp8(model, plan, dequantised_product) == 6
    want = stream(naive(make_transformer(**SIZE), plan), make_cache(model))
    assert error(stream(model, make_cache(model)), want) <= EXACT
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.q in fp8 without blocks\.0\.self_attn\.k"):
        apply_fp8(make_transformer(**SIZE), Fp8Plan((r"blocks\.0\.self_attn\.q",)))


def test_the_plan_of_a_model_spares_its_first_and_last_block():
    plan = plan_for(12)
    fp8 = [i for i in range(12) if plan.covers(f"blocks.{i}.ffn.0")]
    assert fp8 == list(range(1, 11))
    assert plan.covers("blocks.1.self_attn.q")
    for name in (
        "blocks.1.cross_attn.k",
        "blocks.1.self_attn.norm_q",
        "head.head",
        "text_embedding.0",
        "time_projection.1",
    ):
        assert not plan.covers(name)


@pytest.mark.parametrize(
    ("changes", "equation"),
    [
        ({"dim": 40, "num_heads": 2}, r"blocks\.0\.self_attn\.q: 40 outputs, 40 inputs: 40 % 16 = 8"),
        ({"ffn_dim": 100}, r"ffn\.0: 100 outputs, 64 inputs: 100 % 16 = 4, 64 % 16 = 0; expected 0 and 0"),
    ],
)
def test_sizes_that_do_not_divide_are_named(make_transformer, changes, equation):
    with pytest.raises(ValueError, match=equation):
        apply_fp8(make_transformer(**{**SIZE, **changes}))


@torch.no_grad()
def test_nan_comes_through(make_transformer, make_cache):
    model = make_transformer(**SIZE)
    apply_fp8(model, product=dequantised_product)
    text, cache = model.embed_text(draw(1, 5, 20)), make_cache(model)
    latents = draw(1, 16, 3, 4, 6)
    latents[0, 0, 1, 2, 3] = torch.nan
    assert model(latents, torch.full((1, 3), 500.0), text, cache, pass_=Pass.DENOISE).isnan().any()


@pytest.mark.parametrize("product", [scaled_product, dequantised_product])
def test_a_layer(product):
    weight, bias = draw(32, 48, seed=1), draw(32, seed=2).bfloat16()
    holder = nn.ModuleDict({"o": nn.Linear(48, 32)})
    holder["o"].weight, holder["o"].bias = nn.Parameter(weight), nn.Parameter(bias)
    apply_fp8(holder, Fp8Plan(("o",)), product)
    x = draw(2, 3, 48, seed=3).bfloat16()
    want = F.linear(NaiveLinear.round_trip(x), NaiveLinear.round_trip(weight), bias.float())
    got = holder["o"](x)
    assert got.dtype == torch.bfloat16
    assert got.shape == (2, 3, 32)
    assert error(got, want) < 4e-3
    assert torch.equal(holder["o"](quantise_rows(x)), got)


@torch.no_grad()
@pytest.mark.parametrize("product", [scaled_product, dequantised_product])
def test_a_partial_product_goes_where_there_is_room_for_it(product):
    layer = Fp8Linear((32, 48), bias=True, product=product)
    layer.weight.copy_(draw(32, 48, seed=1))
    layer.weight_scale.fill_(0.5)
    layer.bias = nn.Parameter(draw(32, seed=2).bfloat16(), requires_grad=False)
    x, shared = quantise_rows(draw(1, 6, 48, seed=3)), torch.empty(1, 6, 32, dtype=torch.bfloat16)
    rooms = {(1, 6, 32): shared}
    layer.join = torch.neg
    layer.room = lambda shape, dtype: rooms.get(tuple(shape)) if dtype is torch.bfloat16 else None
    assert layer(x) is shared
    rooms.clear()
    assert torch.equal(layer(x), -shared)


@torch.no_grad()
def test_layers_trace_whole(make_transformer, make_cache):
    torch._dynamo.reset()
    model, eager = make_transformer(**SIZE), make_transformer(**SIZE)
    counter = CompileCounterWithBackend("aot_eager")
    for each in (model, eager):
        apply_fp8(each, product=dequantised_product)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    got = stream(model, make_cache(model))
    assert error(got, stream(eager, make_cache(eager))) <= EXACT
    assert counter.frame_count >= 2
    torch._dynamo.reset()


def test_a_cpu_has_no_fp8_product():
    assert why_no_fp8(torch.device("cpu")) == "cpu has no fp8 product"


@pytest.mark.parametrize(
    ("version", "works"), [("2.11.0+cu128", False), ("2.12.0", True), ("2.13.1a0+git", True)]
)
def test_the_kernel_that_ignores_streams_is_refused(monkeypatch, version, works):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch, "__version__", version)
    reason = why_no_fp8(torch.device("cuda", 0))
    assert (reason is None) is works
    assert works or "pytorch #177651, fixed in 2.12" in reason


@pytest.mark.parametrize(
    ("capability", "works"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_capabilities(monkeypatch, capability, works):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    reason = why_no_fp8(torch.device("cuda", 0))
    assert (reason is None) is works
    assert works or reason == "Some GPU is SM 8.0, fp8 products need SM 8.9"


KREA_SLICE = replace(WAN_14B, num_layers=2, text_dim=20, text_len=32)


@pytest.fixture
def slices():
    """Two layers of the 14B shape in bf16 on the device, plain and fp8, random weights of its scale."""

    def make():
        torch.manual_seed(0)
        model = WanTransformer(KREA_SLICE).eval().requires_grad_(False)
        return model.to("cuda", torch.bfloat16)

    quantised = make()
    apply_fp8(quantised)
    return make(), quantised


def cache_of(model, grid=(4, 6)):
    return KVCache.allocate(
        model.config, policy=CachePolicy.RECOMPUTE, frames=3, grid=grid, device="cuda", dtype=torch.bfloat16
    )


@pytest.mark.gpu
def test_the_product_of_this_device():
    if why_no_fp8(torch.device("cuda", 0)):
        pytest.skip("no fp8 product on this device")
    assert product_error(torch.device("cuda", 0)) < 4e-3  # one rounding to bf16


@pytest.mark.gpu
@torch.no_grad()
def test_two_layers_of_14b_stay_near_bf16(slices):
    plain, quantised = slices
    assert 1e-4 < error(stream(quantised, cache_of(quantised)), stream(plain, cache_of(plain))) < QUANTISED


@pytest.mark.gpu
@torch.no_grad()
def test_the_device_multiplies_as_the_reference(slices):
    quantised = slices[1]
    got = stream(quantised, cache_of(quantised))
    for module in quantised.modules():
        if isinstance(module, Fp8Linear):
            module.product = dequantised_product
    assert error(got, stream(quantised, cache_of(quantised))) < 2e-2


@pytest.mark.gpu
@torch.no_grad()
def test_inside_a_cuda_graph(slices):
    quantised = slices[1]
    cache = cache_of(quantised)
    plan = cache.begin(Pass.DENOISE, 3)
    text = quantised.embed_text(draw(1, 5, 20, device="cuda"))
    latents = draw(1, 16, 3, 8, 12, device="cuda")
    times = quantised.embed_time(torch.full((1, 3), 700.0, device="cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            quantised.run(latents, times, text, cache, plan)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = quantised.run(latents, times, text, cache, plan)
    for _ in range(2):
        latents.add_(0.3)
        graph.replay()
        want = quantised.run(latents, times, text, cache, plan)
        torch.testing.assert_close(captured, want, rtol=0, atol=0)


@pytest.mark.gpu
@torch.no_grad()
def test_inductor_compiles_every_layer_whole(slices):
    torch._dynamo.reset()
    quantised = slices[1]
    assert quantised.attention is AttentionBackend.AUTO
    want = stream(quantised, cache_of(quantised))
    for block in quantised.blocks:
        block.compile(fullgraph=True, dynamic=False)
    assert error(stream(quantised, cache_of(quantised)), want) < 2e-2
    torch._dynamo.reset()
