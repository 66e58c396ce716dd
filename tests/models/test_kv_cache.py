"""Call order, sizes and layout of the KV cache; what its contents are worth, test_transformer.py says."""

import pytest
import torch

from wanrt.models.kv_cache import CachePolicy, CallOrderError, KVCache, Pass
from wanrt.models.transformer import TransformerConfig

CONFIG = TransformerConfig(dim=24, ffn_dim=8, num_layers=2, num_heads=2)


def allocate(policy=CachePolicy.RECOMPUTE, **changes):
    return KVCache.allocate(CONFIG, **{"policy": policy, "frames": 4, "grid": (2, 3), **changes})


def step(cache, pass_, frames=3):
    plan = cache.begin(pass_, frames)
    cache.finish(plan)
    return plan


def write(cache, plan, key_and_value):
    for layer in cache.layers:
        cache.write(layer, plan, key_and_value, key_and_value)


def addresses(cache):
    return [
        t.data_ptr()
        for layer in cache.layers
        for t in (layer.key, layer.value, layer.raw_key)
        if t is not None
    ]


@pytest.mark.parametrize(
    ("policy", "pass_", "expected"),
    [
        (CachePolicy.RECOMPUTE, Pass.COMMIT, "context or denoise"),
        (CachePolicy.ROLLING, Pass.CONTEXT, "commit or denoise"),
        (CachePolicy.SINK, Pass.CONTEXT, "commit or denoise"),
    ],
)
def test_foreign_pass_is_refused(policy, pass_, expected):
    cache = allocate(policy, sink=policy is CachePolicy.SINK)
    with pytest.raises(CallOrderError, match=f"policy {policy}: got a {pass_} pass, expected {expected}"):
        cache.begin(pass_, 3)


def test_context_only_grows_until_reset():
    cache = allocate()
    step(cache, Pass.CONTEXT, 3)
    step(cache, Pass.CONTEXT, 4)
    with pytest.raises(
        CallOrderError, match=r"got a context pass of 3 .* after one of 4, expected 4 to 4.*reset"
    ):
        cache.begin(Pass.CONTEXT, 3)
    cache.reset()
    assert cache.context_frames == 0
    assert step(cache, Pass.CONTEXT, 3).keep == 3


@pytest.mark.parametrize("frames", [0, 5])
def test_context_beyond_capacity_is_refused(frames):
    with pytest.raises(CallOrderError, match=f"got a context pass of {frames} .*expected 1 to 4"):
        allocate().begin(Pass.CONTEXT, frames)


@pytest.mark.parametrize("frames", [0, 4])
def test_chunk_beyond_its_size_is_refused(frames):
    with pytest.raises(CallOrderError, match=f"got a denoise pass of {frames} .*expected 1 to 3"):
        allocate().begin(Pass.DENOISE, frames)


def test_failed_begin_changes_nothing():
    cache = allocate()
    step(cache, Pass.CONTEXT, 3)
    with pytest.raises(CallOrderError):
        cache.begin(Pass.COMMIT, 3)
    assert cache.context_frames == 3


def test_plans_become_static():
    """From the third chunk on every plan repeats, so that a captured graph can be replayed."""
    cache = allocate(CachePolicy.ROLLING)
    plans = [(step(cache, Pass.DENOISE), step(cache, Pass.COMMIT)) for _ in range(6)]
    assert [d.context for d, _ in plans] == [0, 3, 4, 4, 4, 4]
    assert len(set(plans[2:])) == 1


@pytest.mark.parametrize("context", range(5))
def test_attended_keys_are_one_run_with_the_biased_ones_in_front(context):
    """Tag every token with its frame and look at what a denoising pass would attend to."""
    cache = allocate()
    layer, tokens = cache.layers[0], cache.tokens_per_frame

    def tagged(first, count):
        tags = torch.arange(first, first + count).repeat_interleave(tokens).float()
        return tags[None, :, None, None].expand(1, -1, 2, 12)

    if context:
        write(cache, step(cache, Pass.CONTEXT, context), tagged(0, context))
    plan = step(cache, Pass.DENOISE)
    write(cache, plan, tagged(10, 3))
    lo, hi = cache.span(plan)
    for buffer in (layer.key, layer.value):
        frames = buffer[0, lo:hi:tokens, 0, 0].int().tolist()
        assert frames == [*range(1, context), *([0] if context else []), 10, 11, 12]
    assert cache.biased_keys(plan) == max(context - 1, 0) * tokens


def test_buffers_never_move_and_have_the_stated_shapes():
    cache = allocate(CachePolicy.SINK, sink=1, batch=2, heads=1, dtype=torch.bfloat16)
    before = addresses(cache)
    assert cache.layers[1].key.shape == cache.layers[1].value.shape == (2, 7 * 6, 1, 12)
    assert cache.layers[1].raw_key.shape == (2, 4 * 6, 1, 12)
    assert cache.layers[1].key.dtype == torch.bfloat16
    assert cache.rope.cos.dtype == torch.float32
    for _ in range(4):
        plan = step(cache, Pass.COMMIT)
        kv = torch.ones(2, 18, 1, 12)
        write(cache, plan, kv)
        for layer in cache.layers:
            cache.commit(layer, plan, kv, kv)
    cache.reset()
    assert addresses(cache) == before


def test_recompute_keeps_no_unrotated_keys():
    cache = allocate()
    assert all(layer.raw_key is None for layer in cache.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"sink": 1}, "expected 0 to 0"),
        ({"policy": CachePolicy.ROLLING, "sink": 2}, "expected 0 to 0"),
        ({"policy": CachePolicy.SINK}, "got sink=0, expected 1 to 4"),
        ({"policy": CachePolicy.SINK, "sink": 5}, "got sink=5, expected 1 to 4"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        allocate(**changes)
