"""The pipeline on one CUDA device against itself without lanes and graphs."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from wanrt.models.kv_cache import CachePolicy, KVCache
from wanrt.models.transformer import WanTransformer
from wanrt.output import PixelFormat, VideoSpec
from wanrt.pipeline.assemble import build_pipeline
from wanrt.pipeline.build import Tuning, Wiring, find_files, join, make_recorder
from wanrt.pipeline.devices import choose_precision
from wanrt.pipeline.graphs import GraphedDenoiser
from wanrt.pipeline.lanes import OneLane
from wanrt.pipeline.models import load_stage0, load_transformer
from wanrt.pipeline.progress import unheard
from wanrt.pipeline.run import converter
from wanrt.script import Curve, RenderJob, Scene, Timeline, load_preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FRAMES = 9 + 5 * 12


@pytest.fixture(scope="module")
def job():
    preset = load_preset("wan-tiny")
    return RenderJob(
        preset=preset, timeline=Timeline.of("a red ball"), seed=3, width=224, height=128, fps=Fraction(16),
        frames=FRAMES, steps=preset.steps, window=3, bias=1.0, anchor="anchor-only", random_weights=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(job):
    device = torch.device("cuda", 0)
    about = (job, None, device, choose_precision(job.precision, device), unheard)
    return load_stage0(*about), load_transformer(*about)


def frames_of(job, models, tuning, lanes=None):
    device = torch.device("cuda", 0)
    pipeline = join(job, *models, device, Wiring(make_recorder(job, device, None)), tuning)
    if lanes is not None:
        pipeline._lanes = pipeline._pixels._lanes = pipeline._pixels._codec._lanes = lanes
    return torch.cat([frames.pixels.cpu() for frames in pipeline.run()])


@pytest.mark.parametrize("bias", [1.0, 0.3])
@pytest.mark.parametrize("window", [3, 6])
def test_lanes_and_graphs_change_no_bit(job, models, bias, window):
    job = replace(job, bias=bias, window=window)
    plain = frames_of(job, models, Tuning(graphs=False), OneLane())
    assert plain.shape == (FRAMES, 128, 224, 3)
    assert torch.equal(frames_of(job, models, Tuning(graphs=False)), plain)
    # cuDNN measures its algorithms for the graphs: another one may round otherwise, and chunks hand it on
    assert (frames_of(job, models, Tuning()).int() - plain.int()).abs().float().mean() < 1


def test_a_prompt_captured_is_the_prompt_launched():
    """Keys, values and span, of prompts of unlike lengths; nothing of a longer one before is left."""
    device, config = torch.device("cuda", 0), load_preset("wan-tiny").transformer_config()
    torch.manual_seed(1)
    model = WanTransformer(config).to(device, torch.bfloat16).eval().requires_grad_(False)
    cache = KVCache.allocate(
        config, policy=CachePolicy.RECOMPUTE, frames=3, grid=(4, 4), device=device, dtype=torch.bfloat16
    )
    denoiser = GraphedDenoiser(model, cache, device)
    denoiser.capture((1, 16, 3, 8, 8), [False], lambda done, of: None)
    for length in (config.text_len, 3, 1):
        prompt = torch.randn(1, length, config.text_dim, device=device)
        with torch.inference_mode():
            denoiser.set_text(prompt)
            want, got = model.embed_text(prompt), denoiser._text
        assert torch.equal(got.span.count, want.span.count)
        for mine, its in zip(got.keys + got.values, want.keys + want.values, strict=True):
            assert torch.equal(mine, its)
    denoiser.close()


@pytest.mark.parametrize("window", [1, 3, 4])
def test_exact_policies_are_bit_identical(job, models, window):
    first, *others = (
        frames_of(replace(job, window=window, anchor=anchor), models, Tuning())
        for anchor in ("decode-all", "overlap", "anchor-only")
    )
    for other in others:
        assert torch.equal(first, other)


def test_the_same_twice(job, models):
    assert torch.equal(frames_of(job, models, Tuning()), frames_of(job, models, Tuning()))


CHANGING = Timeline(
    (
        Scene((("a red ball", 1.0),), 0, 0),
        Scene((("a star", 0.5), ("a blue ball", 0.5)), 21, 2, Fraction(24), Curve.SLERP),
    )
)


def test_no_frame_waits_for_a_compiler(job, models):
    """The first chunk's conversion takes as long as the others': its kernel is compiled before the stream."""
    device = torch.device("cuda", 0)
    recorder = make_recorder(job, device, None)
    convert = converter(VideoSpec(job.width, job.height, job.fps), PixelFormat.NV12, device)
    pipeline = join(job, *models, device, Wiring(recorder, convert=convert))
    for frames in pipeline.run():
        frames.pixels.numpy()
    torch.cuda.synchronize()
    recorder.poll()
    first, *others = (s.end_ns - s.start_ns for s in recorder.recent(60) if s.name == "convert")
    assert len(others) == 5
    assert first < 20 * max(others), "0.4 s against 0.1 ms, where it is compiled"


@pytest.mark.parametrize(
    ("anchor", "random"), [("anchor-only", True), ("anchor-only", False), ("latent", True)]
)
def test_no_sync_inside_a_run(job, anchor, random):
    """Nor where a prompt changes: wan-tiny's own text encoder reads it, or with random weights its hash does."""
    device = torch.device("cuda", 0)
    changed = replace(job, anchor=anchor, timeline=CHANGING, random_weights=random)
    pipeline = build_pipeline(
        changed, find_files(changed), device, Wiring(make_recorder(changed, device, None)), Tuning()
    )
    frames = pipeline.run()
    shown = [next(frames)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        shown.extend(frames)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(f.count for f in shown) == FRAMES


@pytest.mark.parametrize("random", [True, False], ids=["hashed", "encoded"])
def test_no_memory_is_asked_for_inside_a_run(job, random):
    """For a prompt as little as for a frame: the driver may let the device finish first."""
    device = torch.device("cuda", 0)
    scenes = (Scene(((f"a ball of {chunk}", 1.0),), 9 + 12 * (chunk - 1), chunk) for chunk in range(5, 13))
    many = Timeline((Scene((("a red ball", 1.0),), 0, 0), *scenes))
    changed = replace(job, timeline=many, random_weights=random, frames=9 + 14 * 12)
    pipeline = build_pipeline(
        changed, find_files(changed), device, Wiring(make_recorder(changed, device, None)), Tuning()
    )
    asked = [torch.cuda.memory_stats(device)["num_device_alloc"] for _ in pipeline.run()]
    assert len(asked) == 15
    assert asked[-1] == asked[3], "the first chunks fill the window"
