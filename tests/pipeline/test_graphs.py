"""Which passes are graphs, and that a replay is fed and booked rightly; the capture itself needs a GPU."""

import pytest
import torch

from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
from wanrt.models.transformer import TransformerConfig, WanTransformer
from wanrt.pipeline import graphs
from wanrt.pipeline.context import AnchorPolicy
from wanrt.pipeline.denoiser import TransformerDenoiser
from wanrt.pipeline.envelope import ChunkRequest, Control
from wanrt.pipeline.mesh import Mesh, MeshSettings
from wanrt.telemetry import Recorder

CONFIG = TransformerConfig(dim=48, ffn_dim=96, num_layers=2, num_heads=4, text_dim=16, text_len=8)
SHAPE = (1, 16, 3, 4, 6)
CPU = torch.device("cpu")


class EagerCall:
    """Stands in for a captured call: runs it again, counts how often."""

    replays = closed = 0

    def __init__(self, function, device, *, warm_up, pool):
        self._function = function
        function()

    def replay(self):
        EagerCall.replays += 1
        return self._function()

    def pool(self):
        return None

    def close(self):
        EagerCall.closed += 1


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "CapturedCall", EagerCall)
    monkeypatch.setattr(EagerCall, "replays", 0)
    monkeypatch.setattr(EagerCall, "closed", 0)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return WanTransformer(CONFIG).eval().requires_grad_(False)


def make_cache(policy, window):
    sink = 3 if policy is CachePolicy.SINK else 0
    return KVCache.allocate(CONFIG, policy=policy, frames=window, grid=(2, 3), sink=sink)


def latents_of(denoiser, policy, window, biases):
    recompute = policy is CachePolicy.RECOMPUTE
    settings = MeshSettings(1, 5.0, window, AnchorPolicy.LATENT, recompute, SHAPE)
    mesh = Mesh(denoiser, settings, Recorder())
    generator = torch.Generator().manual_seed(3)
    made = []
    for chunk, bias in enumerate(biases):
        prompt = torch.randn(1, 5, 16, generator=generator)
        control = Control((1000.0, 625.0), bias)
        mesh.set_text(chunk, prompt)
        made.append(mesh.run(ChunkRequest(chunk, control=control)).latents)
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("policy", list(CachePolicy))
@pytest.mark.parametrize("window", [3, 4, 6])
@pytest.mark.parametrize("bias", [1.0, 0.3])
def test_replays_equal_eager_passes(model, policy, window, bias):
    denoiser = graphs.GraphedDenoiser(model, make_cache(policy, window), CPU)
    denoiser.capture(SHAPE, [bias != 1.0], lambda done, of: None)
    got = latents_of(denoiser, policy, window, [bias] * 6)
    want = latents_of(TransformerDenoiser(model, make_cache(policy, window), CPU), policy, window, [bias] * 6)
    assert torch.equal(got, want)
    first_context = 1 if policy is CachePolicy.RECOMPUTE else 0  # the first chunk has none
    # a prompt, a context or commit pass and two steps a chunk
    assert EagerCall.replays == 4 * 6 - first_context


def test_a_bias_that_was_not_captured_runs_eagerly(model):
    policy, biases = CachePolicy.RECOMPUTE, [1.0, 1.0, 0.5, 0.2, 1.0]
    denoiser = graphs.GraphedDenoiser(model, make_cache(policy, 3), CPU)
    denoiser.capture(SHAPE, [False], lambda done, of: None)
    got = latents_of(denoiser, policy, 3, biases)
    want = latents_of(TransformerDenoiser(model, make_cache(policy, 3), CPU), policy, 3, biases)
    assert torch.equal(got, want)


def test_live_changes_capture_nothing_anew(model):
    policy, biases = CachePolicy.RECOMPUTE, [1.0, 0.5, 0.2, 1.0, 0.9]
    denoiser = graphs.GraphedDenoiser(model, make_cache(policy, 3), CPU)
    seen = []
    denoiser.capture(SHAPE, [True, False], lambda done, of: seen.append((done, of)))
    captured = dict(denoiser._graphs)
    # one context pass, two denoising passes with and without bias, the prompt
    assert seen == [(i, 6) for i in range(6)]
    got = latents_of(denoiser, policy, 3, biases)
    want = latents_of(TransformerDenoiser(model, make_cache(policy, 3), CPU), policy, 3, biases)
    assert torch.equal(got, want)
    assert denoiser._graphs == captured
    assert EagerCall.replays == 4 * 5 - 1


@pytest.mark.parametrize("policy", list(CachePolicy))
@pytest.mark.parametrize("window", range(3, 13))
def test_every_plan_of_a_stream_is_captured(policy, window):
    cache = make_cache(policy, window)
    plans = set(graphs.all_plans(cache))
    for chunk in range(8):
        if policy is CachePolicy.RECOMPUTE and chunk:
            plan = cache.begin(Pass.CONTEXT, min(3 * chunk, window))
            assert plan in plans
            cache.finish(plan)
        assert cache.begin(Pass.DENOISE, 3) in plans
        if policy is not CachePolicy.RECOMPUTE:
            plan = cache.begin(Pass.COMMIT, 3)
            assert plan in plans
            cache.finish(plan)


def test_a_capture_that_breaks_off_keeps_no_graph(model):
    """They would hold a communicator that NCCL then never gives up."""
    denoiser = graphs.GraphedDenoiser(model, make_cache(CachePolicy.RECOMPUTE, 3), CPU)

    def fail_at_third(done, of):
        if done == 2:
            raise RuntimeError("another rank is gone")

    with pytest.raises(RuntimeError, match="another rank"):
        denoiser.capture(SHAPE, (False,), fail_at_third)
    assert EagerCall.closed == 2
    denoiser.close()
    assert EagerCall.closed == 2
