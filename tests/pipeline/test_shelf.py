"""Models that stay loaded from run to run."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from wanrt.pipeline.assemble import build_pipeline
from wanrt.pipeline.bench import run_bench
from wanrt.pipeline.build import Tuning, Wiring, make_recorder
from wanrt.pipeline.devices import choose_precision
from wanrt.pipeline.matrix import entries_of
from wanrt.pipeline.progress import unheard
from wanrt.pipeline.shelf import Shelf
from wanrt.script import RenderJob, Timeline
from wanrt.telemetry import Recorder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job(smaller_preset):
    preset = smaller_preset
    return RenderJob(
        preset=preset, timeline=Timeline.of("a ball"), seed=3, width=64, height=48, fps=Fraction(16), frames=45,
        steps=preset.steps, window=3, bias=0.5, anchor="anchor-only", random_weights=True, device="cpu",
        topology="single",
    )  # fmt: skip


def video(job, shelf=None):
    pipeline = build_pipeline(job, None, CPU, Wiring(Recorder(), shelf=shelf))
    try:
        return torch.cat([frames.pixels for frames in pipeline.run()])
    finally:
        pipeline.close()


def models(shelf, job, compiled=False):
    precision = choose_precision(job.precision, CPU)
    return (
        shelf.stage0(job, None, CPU, precision, unheard),
        shelf.transformer(job, None, CPU, precision, unheard, compiled=compiled),
    )


def test_a_run_with_the_models_of_another_is_the_same_bit_for_bit(job):
    """Another size, window, anchor and length in between leave nothing behind in them."""
    shelf = Shelf()
    wanted = video(job)
    video(replace(job, width=32, height=64, window=5, anchor="latent", frames=21), shelf)
    assert torch.equal(video(job, shelf), wanted)
    assert torch.equal(video(job, shelf), wanted)


def test_what_is_the_same_and_what_is_not(job):
    shelf = Shelf()
    stage0, transformer = models(shelf, job)
    for same in ({"width": 96}, {"anchor": "latent"}, {"window": 6}, {"frames": 9}, {"bias": 1.0}):
        assert models(shelf, replace(job, **same)) == (stage0, transformer)
    other = models(shelf, replace(job, seed=4))
    assert other[0] is not stage0
    assert other[1] is not transformer
    half = models(shelf, replace(job, seed=4, precision="bf16"))
    assert half[1] is not other[1]
    assert models(shelf, replace(job, seed=4, precision="bf16"), compiled=True)[1] is not half[1]
    assert models(shelf, replace(job, attention="math"))[1].attention == "math"
    wider = job.preset.model_copy(
        update={"transformer": job.preset.transformer.model_copy(update={"dim": 192})}
    )
    assert models(shelf, replace(job, preset=wider))[1].config.dim == 192


def test_the_old_model_is_gone_before_another_is_loaded(job, monkeypatch):
    import weakref

    shelf, alive = Shelf(), []
    held = weakref.ref(models(shelf, job)[1])

    def load(*args):
        alive.append(held() is not None)

    monkeypatch.setattr("wanrt.pipeline.shelf.load_transformer", load)
    models(shelf, replace(job, precision="bf16"))
    assert alive == [False]


def test_entries_of_one_device_load_once(tmp_path):
    flags = {"size": "32x32", "random_weights": True, "device": "cpu"}
    said = []
    run_bench(flags, entries_of(None, "single,single:latent:48x32"), 2, 1, Tuning(), None, say=said.append)
    assert sum("loading transformer" in line for line in said) == 1
    assert sum("loading VAE" in line for line in said) == 1
    assert sum("fps, period" in line for line in said) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_runs_on_a_gpu_share_models_too(job, graphs):
    """Eager bit for bit; as graphs cuDNN measures its algorithms anew, and another one may round otherwise."""
    device, shelf = torch.device("cuda", 0), Shelf()

    def made(job, shelf):
        wiring = Wiring(make_recorder(job, device, None), shelf=shelf)
        pipeline = build_pipeline(job, None, device, wiring, Tuning(graphs=graphs))
        return torch.cat([frames.pixels.cpu() for frames in pipeline.run()])

    job = replace(job, device="cuda:0")
    wanted = made(job, None)
    made(replace(job, width=32, height=64, window=5, anchor="latent", frames=21), shelf)
    found = made(job, shelf)
    if graphs:
        assert (found.int() - wanted.int()).abs().float().mean() < 1
    else:
        assert torch.equal(found, wanted)
