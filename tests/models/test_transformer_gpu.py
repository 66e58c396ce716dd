"""The passes on a CUDA device: kernels and attention backends in place, no syncs, one graph a pass."""

import pytest
import torch

from wanrt.models.attention import AttentionBackend, why_not
from wanrt.models.memory import Elementwise
from wanrt.models.transformer import CachePolicy, Pass
from wanrt_kernels.adaln import add_norm_ref
from wanrt_kernels.rope_norm import rope_norm_ref

pytestmark = pytest.mark.gpu

SIZE = {"dim": 384, "num_heads": 3, "ffn_dim": 512, "num_layers": 3}  # heads of 128, as in 14B and 1.3B
GRID = (4, 6)


def draw(*shape, seed=0, device="cuda"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Passes:
    """One stream's inputs at fixed addresses, and its three passes."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.device = model.patch_embedding.weight.device
        self.latents, self.context = (draw(1, 16, 3, 8, 12, seed=s, device=self.device) for s in (1, 2))
        self.noisy = model.embed_time(torch.tensor([[700.0, 300.0, 20.0]], device=self.device))
        self.clean = model.embed_time(torch.zeros(1, 3, device=self.device))
        self.less_noisy = model.embed_time(torch.tensor([[600.0, 200.0, 10.0]], device=self.device))
        self.bias = torch.tensor(0.3).log().to(self.device)
        self.prompts = [draw(1, length, 20, seed=length, device=self.device) for length in (3, 5)]
        self.text = model.embed_text(self.prompts[0])

    def run(self, plan, biased=True):
        latents, time = (
            (self.latents, self.noisy) if plan.pass_ is Pass.DENOISE else (self.context, self.clean)
        )
        bias = self.bias if biased and plan.pass_ is not Pass.CONTEXT else None
        return self.model.run(latents, time, self.text, self.cache, plan, bias)

    def plans(self):
        """The steady passes: context or commit first, so that the denoising pass has something to see."""
        first = Pass.CONTEXT if self.cache.policy is CachePolicy.RECOMPUTE else Pass.COMMIT
        plans = []
        for pass_ in (first, first, Pass.DENOISE):
            plans.append(self.cache.begin(pass_, 3))
            self.cache.finish(plans[-1])
        return plans[1:]

    def change(self):
        """What changes live, in place."""
        self.latents.add_(0.3)
        self.context.mul_(0.9)
        self.noisy.copy_(self.less_noisy)
        self.bias.mul_(0.5)
        self.model.embed_text_into(self.text, self.prompts[1])


@pytest.fixture
def make_passes(make_transformer, make_cache):
    def make(policy=CachePolicy.RECOMPUTE, dtype=torch.bfloat16, device="cuda"):
        model = make_transformer(**SIZE).to(device, dtype)
        sink = 1 if policy is CachePolicy.SINK else 0
        return Passes(
            model, make_cache(model, policy, frames=3, sink=sink, grid=GRID, device=device, dtype=dtype)
        )

    return make


def error(got, expected):
    got, expected = got.double().cpu(), expected.double().cpu()
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("policy", CachePolicy)
@torch.no_grad()
def test_passes_never_wait_for_the_device(make_passes, policy):
    passes = make_passes(policy)
    for plan in passes.plans():
        passes.run(plan)  # kernels are built on the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in passes.plans():
            passes.run(plan)
            passes.run(plan, biased=False)
        passes.change()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", CachePolicy)
@torch.no_grad()
def test_graphs_replay_what_eager_passes_give(make_passes, policy):
    passes, eager = make_passes(policy), make_passes(policy)
    fill, denoise = passes.plans()
    graphs, velocity = {}, None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for plan in (fill, denoise):
            passes.run(plan)
            graphs[plan] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[plan], stream=side):
                velocity = passes.run(plan)
    torch.cuda.current_stream().wait_stream(side)
    # the same history for both: what the cache holds now, then two changes
    for mine, theirs in zip(eager.cache.layers, passes.cache.layers, strict=True):
        for name in ("key", "value", "raw_key"):
            if getattr(mine, name) is not None:
                getattr(mine, name).copy_(getattr(theirs, name))
    for _ in range(3):
        for plan in (fill, denoise):
            graphs[plan].replay()
            expected = eager.run(plan)
        torch.testing.assert_close(velocity, expected, rtol=0, atol=0)
        passes.change()
        eager.change()


@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_kernels_lose_no_precision(make_passes, backend, biased):
    """Error against fp32 on the CPU, next to that of plain PyTorch in bf16."""
    if reason := why_not(backend, torch.device("cuda", 0), torch.bfloat16, 128):
        pytest.skip(reason)

    def velocity(passes):
        return [passes.run(plan, biased) for plan in passes.plans()][-1]

    exact = velocity(make_passes(dtype=torch.float32, device="cpu"))
    plain, fused = make_passes(), make_passes()
    plain.model.elementwise = Elementwise(add_norm_ref, rope_norm_ref)
    plain.model.attention = AttentionBackend.SDPA
    fused.model.attention = backend
    limit = 1.2 * error(velocity(plain), exact)
    assert limit < 0.05
    assert error(velocity(fused), exact) <= limit


@pytest.mark.parametrize("policy", CachePolicy)
@torch.no_grad()
def test_inductor_compiles_every_pass_whole(make_passes, policy):
    torch._dynamo.reset()
    passes, eager = make_passes(policy), make_passes(policy)
    run = torch.compile(passes.model.run, fullgraph=True, dynamic=False)
    for plan, other in zip(passes.plans(), eager.plans(), strict=True):
        latents = passes.latents
        bias = None if plan.pass_ is Pass.CONTEXT else passes.bias
        got = run(latents, passes.noisy, passes.text, passes.cache, plan, bias)
        expected = eager.model.run(latents, passes.noisy, passes.text, eager.cache, other, bias)
        for mine, theirs in zip(passes.cache.layers, eager.cache.layers, strict=True):
            assert error(mine.key, theirs.key) < 2e-2
    assert error(got, expected) < 2e-2
    torch._dynamo.reset()
