"""torch.compile: one graph a pass, no breaks, and nothing that changes live recompiles."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from wanrt.models.attention import AttentionBackend
from wanrt.models.transformer import CachePolicy, Pass


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def counted():
    """(counter, compile): `compile(model)` has no breaks or raises; `counter.frame_count` counts graphs."""
    counter = CompileCounterWithBackend("eager")
    return counter, lambda model: torch.compile(model, fullgraph=True, dynamic=False, backend=counter)


def chunk_of_passes(model, cache, text, *, seed, context, bias, commit=False):
    """Context pass (if any frames), two denoising steps, commit (if asked); the last velocity."""
    if context:
        model(draw(1, 16, context, 4, 6, seed=seed), torch.zeros(1, context), text, cache, pass_=Pass.CONTEXT)
    for step in range(2):
        latents, t = draw(1, 16, 3, 4, 6, seed=seed + step), torch.rand(1, 3) * 1000
        velocity = model(latents, t, text, cache, pass_=Pass.DENOISE, bias=bias)
    if commit:
        model(latents, torch.zeros(1, 3), text, cache, pass_=Pass.COMMIT, bias=bias)
    return velocity


@pytest.mark.parametrize("backend", [AttentionBackend.SDPA, AttentionBackend.MATH])
@torch.no_grad()
def test_recompute_traces_whole_and_once(make_transformer, make_cache, counted, backend):
    model = make_transformer()
    model.attention = backend
    counter, compile_ = counted
    compiled = compile_(model)
    cache, eager_cache = make_cache(model), make_cache(model)
    graphs = []
    for chunk in range(5):
        bias = torch.tensor(0.3 + 0.1 * chunk).log()
        text = model.embed_text(draw(1, 5, 20, seed=chunk))  # a prompt switch every chunk
        kwargs = {"text": text, "seed": 10 * chunk, "context": min(3 * chunk, 3), "bias": bias}
        torch.manual_seed(chunk)
        got = chunk_of_passes(compiled, cache, **kwargs)
        torch.manual_seed(chunk)
        torch.testing.assert_close(got, chunk_of_passes(model, eager_cache, **kwargs))
        graphs.append(counter.frame_count)
    # first chunk: denoise; then context (from empty) and denoise with context; then context again; then none
    assert graphs == [1, 3, 4, 4, 4]


@torch.no_grad()
def test_rolling_traces_whole_and_once(make_transformer, make_cache, counted):
    model = make_transformer()
    counter, compile_ = counted
    compiled = compile_(model)
    cache, eager_cache = (make_cache(model, CachePolicy.SINK, frames=4, sink=1) for _ in range(2))
    graphs = []
    for chunk in range(5):
        text = model.embed_text(draw(1, 5, 20, seed=chunk))
        kwargs = {
            "text": text,
            "seed": 10 * chunk,
            "context": 0,
            "bias": torch.tensor(-0.1 - chunk),
            "commit": True,
        }
        torch.manual_seed(chunk)
        got = chunk_of_passes(compiled, cache, **kwargs)
        torch.manual_seed(chunk)
        torch.testing.assert_close(got, chunk_of_passes(model, eager_cache, **kwargs))
        graphs.append(counter.frame_count)
    assert graphs == [2, 4, 6, 6, 6]


@torch.no_grad()
def test_layers_compiled_apart_share_their_graphs(make_transformer, make_cache, counted):
    model = make_transformer(num_layers=4)
    counter, _ = counted
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    text, cache = model.embed_text(draw(1, 5, 20)), make_cache(model)
    graphs = []
    for chunk in range(3):
        chunk_of_passes(model, cache, text, seed=chunk, context=min(3 * chunk, 3), bias=torch.tensor(-1.0))
        graphs.append(counter.frame_count)
    assert graphs == [2, 6, 6]  # the first layer has no residual to finish


@torch.no_grad()
def test_explain_counts_no_breaks(make_transformer, make_cache):
    model = make_transformer()
    text, cache = model.embed_text(draw(1, 5, 20)), make_cache(model)
    model(draw(1, 16, 3, 4, 6), torch.zeros(1, 3), text, cache, pass_=Pass.CONTEXT)
    for pass_, bias in ((Pass.CONTEXT, None), (Pass.DENOISE, None), (Pass.DENOISE, torch.tensor(-1.0))):
        report = torch._dynamo.explain(model)(
            draw(1, 16, 3, 4, 6), torch.zeros(1, 3), text, cache, pass_=pass_, bias=bias
        )
        assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


def test_training_pass_and_text_trace_whole(make_transformer, counted):
    model = make_transformer().requires_grad_(True)
    _, compile_ = counted
    embed = compile_(model.embed_text)
    train = compile_(model.forward_train)
    args = draw(1, 16, 3, 4, 6), torch.zeros(1, 3), draw(1, 16, 3, 4, 6), torch.rand(1, 3)
    got = train(*args, embed(draw(1, 5, 20)))
    torch.testing.assert_close(got, model.forward_train(*args, model.embed_text(draw(1, 5, 20))))
    got.sum().backward()
