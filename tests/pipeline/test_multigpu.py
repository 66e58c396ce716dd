"""Pipelines over two CUDA devices, NCCL between them.

A start takes longer than a video here: each is rendered once, and the next one's rank is on its way meanwhile. With
pytest-xdist, `--dist loadgroup` keeps all of it in one worker, so that none renders what another has.
"""

import os
import signal
from dataclasses import replace
from fractions import Fraction
from functools import partial
from statistics import median

import pytest
import torch

from tests.pipeline.test_ranks import endless, rendered
from wanrt.parallel.reserve import Reserve
from wanrt.pipeline.assemble import build_pipeline
from wanrt.pipeline.bench import bench
from wanrt.pipeline.build import Tuning, Wiring, make_recorder
from wanrt.pipeline.ranks import prepare
from wanrt.script import Curve, RenderJob, Scene, Timeline, load_preset

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.xdist_group("two devices"),
]
FIRST = torch.device("cuda", 0)
TOPOLOGIES = ["tp=2", "ulysses=2", "pp1+tp=1", "tp=2+vae=2", "ulysses=2+vae=2"]


def job_of(preset, device):
    return RenderJob(
        preset=preset, timeline=Timeline.of("a red ball"), seed=3, width=224, height=128, fps=Fraction(16),
        frames=9 + 5 * 12, steps=preset.steps, window=3, bias=0.3, anchor="anchor-only", random_weights=True,
        device=device, precision="fp32", topology="single",
    )  # fmt: skip


class Videos:
    """Videos of a job, each rendered once, whoever asks."""

    def __init__(self, job, device, reserve):
        self.job, self.device, self.reserve = job, device, reserve
        self._made = {}

    def of(self, topology="single", *, graphs=True, anchor="anchor-only", precision="fp32"):
        """(latents, frames), on the CPU."""
        key = topology, graphs, anchor, precision
        if key not in self._made:
            job = replace(self.job, topology=topology, anchor=anchor, precision=precision)
            self._made[key] = self._render(job, Tuning(graphs=graphs))
        return self._made[key]

    def _render(self, job, tuning):
        wiring = Wiring(make_recorder(job, self.device, None), reserve=self.reserve)
        pipeline = build_pipeline(job, None, self.device, wiring, tuning)
        latents, receive = [], pipeline._mesh.receive

        def listening():
            result = receive()
            latents.append(result.latents)
            return result

        pipeline._mesh.receive = listening
        self.reserve.fill(1)  # the next one's: it imports while this one is made
        try:
            frames = [frames.pixels for frames in pipeline.run()]
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return torch.cat(latents, dim=2).cpu(), torch.cat([f.cpu() for f in frames])
        finally:
            pipeline.close()


@pytest.fixture(scope="module")
def videos():
    with Reserve(partial(prepare, device="cuda")) as reserve:
        yield Videos(job_of(load_preset("wan-tiny"), "cuda:0"), FIRST, reserve)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_same_video_as_one_device(videos, topology, graphs):
    """fp32 with TF32 off in matrix products: rounding alone, which five chunks let grow a little."""
    single = videos.of()
    latents, pixels = videos.of(topology, graphs=graphs)
    scale = single[0].abs().max().item()
    torch.testing.assert_close(latents, single[0], rtol=0, atol=1e-3 * scale)
    assert (pixels.int() - single[1].int()).abs().float().mean() < 1


@pytest.mark.parametrize("anchor", ["decode-all", "overlap"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_policies_agree_bit_for_bit(videos, topology, anchor):
    latents, pixels = videos.of(topology, precision="auto")
    other_latents, other_pixels = videos.of(topology, anchor=anchor, precision="auto")
    assert torch.equal(latents, other_latents)
    assert torch.equal(pixels, other_pixels)


def paced(job):
    """Under PP1, with a transformer so deep that the device sets the pace, not the host that launches its graphs."""
    deep = job.preset.transformer.model_copy(
        update={"dim": 1024, "ffn_dim": 4096, "num_heads": 8, "num_layers": 64}
    )
    preset = job.preset.model_copy(update={"transformer": deep})
    return replace(job, topology="pp1+tp=1", precision="auto", preset=preset)


def test_the_mesh_waits_for_nothing_but_the_anchor(videos):
    """Under PP1 a bubble longer than anchor decode + encode + transfer + 2 ms is a defect."""
    got = bench(paced(videos.job), chunks=12)
    assert got.anchor_path.p50_ms < got.costs.decode + got.costs.encode + 0.5 + 2.0


def test_a_changed_prompt_does_not_hold_the_mesh_up(videos):
    """Nor does the first of a kind: bubbles are as above behind a cut and a blend, along the arc and straight."""
    scenes = (
        Scene((("a red ball", 1.0),), 0, 0),
        Scene((("a star", 1.0),), 33, 3, Fraction(12), Curve.SLERP),
        Scene((("a blue ring", 1.0),), 57, 5),
        Scene((("a white cross", 1.0),), 81, 7, Fraction(12)),
    )
    job = replace(paced(videos.job), timeline=Timeline(scenes), frames=9 + 8 * 12)
    recorder = make_recorder(job, FIRST, None)
    pipeline = build_pipeline(job, None, FIRST, Wiring(recorder))
    try:
        for _ in pipeline.run():
            pass
    finally:
        pipeline.close()
    spans = recorder.recent(600)
    ends = {span.chunk: span.end_ns for span in spans if span.name == "step"}
    starts = {span.chunk: span.start_ns for span in spans if span.name == "context"}
    changed = {span.chunk for span in spans if span.name == "text"} - {0}
    anchor = sum(
        median((span.end_ns - span.start_ns) * 1e-6 for span in spans if span.name == name)
        for name in ("anchor-decode", "anchor-encode")
    )
    held_up = {chunk: (starts[chunk] - ends[chunk - 1]) * 1e-6 for chunk in starts if chunk > 1}
    print(f"changed {sorted(changed)}, anchor {anchor:.2f} ms, held up {held_up}")
    assert changed == {3, 4, 5, 7, 8}
    assert max(held_up.values()) < anchor + 0.5 + 2.0


@pytest.mark.parametrize("topology", ["ulysses=2", "tp=2", "pp1+tp=1", "ulysses=2+vae=2"])
def test_a_killed_rank_is_named_and_the_file_is_finished(videos, tmp_path, topology):
    """Kernels and exchanges under way wait for a rank that is gone: nothing hangs, the video ends where it was."""
    action = lambda processes: os.kill(processes[0].pid, signal.SIGKILL)  # noqa: E731
    message, took = rendered(endless(replace(videos.job, precision="auto"), tmp_path, topology), action)
    assert "(cuda:1) failed: killed by signal 9" in message
    assert took < 15
