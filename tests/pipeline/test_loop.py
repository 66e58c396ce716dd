import gc
from dataclasses import dataclass

import pytest
import torch

from wanrt.errors import RunError
from wanrt.pipeline.cancel import Cancel, CancelledError
from wanrt.pipeline.context import AnchorPolicy
from wanrt.pipeline.envelope import ChunkRequest, Control
from wanrt.pipeline.loop import to_rgb8
from wanrt.telemetry import Recorder

EXACT = ["decode-all", "overlap", "anchor-only"]
CONTROL = Control((1000.0, 625.0))
SEVEN_CHUNKS = 9 + 6 * 12


def video(pipeline):
    return torch.cat([frames.pixels for frames in pipeline.run()])


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("policy", list(AnchorPolicy))
@pytest.mark.parametrize("launch_on_submit", [False, True])
def test_matches_the_naive_video(fake_pipeline, naive_video, window, policy, launch_on_submit):
    pipeline, _, _ = fake_pipeline(
        policy=policy, window=window, frames=SEVEN_CHUNKS, launch_on_submit=launch_on_submit
    )
    _, want = naive_video(policy.value, window, SEVEN_CHUNKS, 5)
    assert torch.equal(video(pipeline), want)


@pytest.mark.parametrize("policy", list(AnchorPolicy))
def test_every_latent_is_decoded_once(fake_pipeline, policy):
    pipeline, vae, _ = fake_pipeline(policy=policy, frames=SEVEN_CHUNKS)
    video(pipeline)
    assert vae.decoded == 21
    assert vae.encoded == (5 if policy.encodes else 0)  # chunks 2..6 have anchors with window 3


@pytest.mark.parametrize("window", [1, 2, 3, 4, 6])
def test_the_vae_work_between_two_chunks(fake_pipeline, window):
    """3, 2, 1, 0, 0 decodes before the next chunk can start; above 3 not even the encode."""
    recorder = Recorder()
    pipeline, _, _ = fake_pipeline(window=window, frames=SEVEN_CHUNKS, recorder=recorder)
    video(pipeline)
    spans = [s for s in recorder.recent(60) if s.chunk == 4 or s.attrs.get("latent") == 15 - window]
    on_path = sum(s.name == "anchor-decode" for s in spans)
    assert on_path == {1: 3, 2: 2, 3: 1, 4: 0, 6: 0}[window]
    assert sum(s.name.endswith("decode") and s.stage == "stage0" for s in spans) >= 3


@pytest.mark.parametrize("frames", [1, 2, 9, 10, 21, 22, 40])
def test_exact_length(fake_pipeline, frames):
    pipeline, vae, _ = fake_pipeline(frames=frames)
    delivered = list(pipeline.run())
    assert sum(f.count for f in delivered) == frames
    assert [f.first_frame for f in delivered] == [0, *range(9, frames, 12)][: len(delivered)]
    assert vae.decoded == -(-(frames - 1) // 4) + 1


def test_a_short_video_is_a_prefix_of_a_long_one(fake_pipeline):
    short, long = video(fake_pipeline(frames=33)[0]), video(fake_pipeline(frames=80)[0])
    assert torch.equal(short, long[:33])


def test_endless(fake_pipeline):
    frames = fake_pipeline(frames=None)[0].run()
    assert torch.equal(torch.cat([next(frames).pixels for _ in range(5)]), video(fake_pipeline(frames=57)[0]))


def test_a_stream_s_collections_pass_over_what_was_there_before(fake_pipeline):
    """Nor is anything kept from collection when the stream has ended, or was given up."""
    frames = fake_pipeline(frames=None)[0].run()
    next(frames)
    assert gc.get_freeze_count() > 10_000
    frames.close()
    assert gc.get_freeze_count() == 0


def test_the_same_twice_and_another_seed(fake_pipeline):
    first = video(fake_pipeline()[0])
    assert torch.equal(first, video(fake_pipeline()[0]))
    assert not torch.equal(first, video(fake_pipeline(seed=6)[0]))


def test_passes_of_a_recomputed_cache(fake_pipeline):
    pipeline, _, denoiser = fake_pipeline(frames=45)
    video(pipeline)
    steps = ["step 1000", "step 938", "step 833", "step 625"]
    first, second, third, fourth = ["text", *steps], ["context 3", *steps], ["text", "context 3", *steps], ["text", "context 3", *steps]  # fmt: skip  # noqa: E501
    assert denoiser.log == first + second + third + fourth


@pytest.mark.parametrize("policy", EXACT)
def test_a_rolling_cache_commits_and_never_waits_for_the_vae(fake_pipeline, policy):
    pipeline, vae, denoiser = fake_pipeline(recompute=False, frames=33, policy=policy)
    video(pipeline)
    assert denoiser.log.count("commit") == 3
    assert not any(entry.startswith("context") for entry in denoiser.log)
    assert vae.encoded == 0


def test_display_comes_after_the_next_submit_only_where_promised(fake_pipeline):
    class Spy:
        def __init__(self, mesh, pipeline):
            self.mesh, self.submitted = mesh, []

        def submit(self, request):
            self.submitted.append(request.chunk)
            self.mesh.submit(request)

        def __getattr__(self, name):
            return getattr(self.mesh, name)

    for policy, ahead in {
        "decode-all": 0,
        "overlap": 1,
        "anchor-only": 1,
        "latent": 1,
        "first-frame": 1,
    }.items():
        pipeline, _, _ = fake_pipeline(policy=policy, frames=45)
        pipeline._mesh = spy = Spy(pipeline._mesh, pipeline)
        for frames in pipeline.run():
            assert spy.submitted[-1] == min(frames.chunk + ahead, 3)


def test_nan_is_named_with_its_chunk_and_never_shown(fake_pipeline, fakes):
    class Broken(fakes[3]):
        def denoise(self, latents, timestep):
            velocity = super().denoise(latents, timestep)
            if self.log.count("step 625") == 3:
                velocity[0, 3, 1, 0, 0] = float("nan")
            return velocity

    shown = []
    pipeline, _, _ = fake_pipeline(denoiser=Broken())
    with pytest.raises(RunError, match=r"chunk 2: NaN or Inf"):
        shown.extend(frames.chunk for frames in pipeline.run())
    assert shown == [0, 1]


def test_bad_pixels_are_named_too(fake_pipeline, fakes):
    class Broken(fakes[2]):
        def decode(self, latent, state):
            pixels = super().decode(latent, state)
            if self.decoded == 6:
                pixels[0, 1, -1, 0, 0] = float("inf")
            return pixels

    pipeline, _, _ = fake_pipeline(vae=Broken())
    with pytest.raises(RunError, match=r"chunk 1: NaN or Inf in the VAE's pixels"):
        video(pipeline)


def test_wrong_order_is_refused(fake_pipeline):
    mesh = fake_pipeline()[0]._mesh
    with pytest.raises(RunError, match="nothing is under way"):
        mesh.receive()
    mesh.set_text(0, torch.zeros(1, 4, 6))
    mesh.submit(ChunkRequest(0, control=CONTROL))
    with pytest.raises(RunError, match="got chunk 1 while chunk 0 is under way"):
        mesh.submit(ChunkRequest(1))
    with pytest.raises(RunError, match="got the prompt of chunk 1 while chunk 0 is under way"):
        mesh.set_text(1, torch.zeros(1, 4, 6))
    mesh.receive()
    mesh.submit(ChunkRequest(2))
    with pytest.raises(RunError, match="got chunk 2, expected 1"):
        mesh.receive()


def test_a_missing_anchor_is_refused(fake_pipeline):
    pipeline, _, _ = fake_pipeline(window=3)
    mesh = pipeline._mesh
    mesh.set_text(0, torch.zeros(1, 4, 6))
    for chunk in range(3):
        mesh.submit(ChunkRequest(chunk, control=CONTROL))
        if chunk < 2:
            mesh.receive()
    with pytest.raises(RunError, match="without the anchor of latent 3"):
        mesh.receive()


def test_cancel_is_obeyed_between_passes(fake_pipeline, fakes):
    cancel = Cancel()

    class Asking(fakes[3]):
        def denoise(self, latents, timestep):
            if len(self.log) == 7:
                cancel.ask(15)
            return super().denoise(latents, timestep)

    pipeline, _, denoiser = fake_pipeline(denoiser=Asking())
    pipeline._mesh._mesh._check = cancel.check
    with pytest.raises(CancelledError, match="SIGTERM") as caught:
        video(pipeline)
    assert caught.value.exit_code == 143
    assert len(denoiser.log) == 8


def test_memory_does_not_grow(fake_pipeline):
    pipeline, _, _ = fake_pipeline(frames=None, window=12)
    frames = pipeline.run()
    sizes = []
    for _ in range(12):
        next(frames)
        stage, mesh = pipeline._pixels, pipeline._mesh._mesh
        sizes.append(
            (len(mesh._latents), len(stage._codec._kept) + len(stage._anchors) + len(stage._decoded))
        )
    assert sizes[-1] == sizes[-2]
    assert max(kept for kept, _ in sizes) <= 15


def test_rgb8_against_numpy():
    import numpy as np

    pixels = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 5).view(1, 3, 2, 4, 5)
    want = np.clip(np.rint((pixels.numpy()[0] + np.float32(1)) * np.float32(127.5)), 0, 255).astype(np.uint8)
    assert np.array_equal(to_rgb8(pixels).numpy(), want.transpose(1, 2, 3, 0))


def test_a_scene_brings_its_own_steps_and_bias(fake_pipeline):
    @dataclass(frozen=True)
    class Scene:
        prompts: tuple = (("a", 1.0),)
        blend_from: None = None
        blend_fraction: float = 1.0
        curve: str = "lerp"
        seed: int | None = None
        bias: float | None = None
        steps: tuple | None = None

    class Timeline:
        def at(self, chunk):
            return Scene(bias=0.25, steps=(1000, 500)) if chunk == 2 else Scene()

    pipeline, _, denoiser = fake_pipeline(timeline=Timeline(), frames=45)
    biases = []
    denoiser.set_bias = biases.append
    video(pipeline)
    assert biases == [0.5, 0.25, 0.5]
    assert denoiser.log.count("step 500") == 1
    assert denoiser.log.count("step 1000") == 4
    assert len(denoiser.log) == 1 + 3 + 3 * 4 + 2
