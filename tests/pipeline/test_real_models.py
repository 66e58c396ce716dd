"""The loop with the real transformer and VAE, tiny and random, through the same `join` that a render uses."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from wanrt.models.transformer import WanTransformer
from wanrt.models.vae import WanVae
from wanrt.pipeline.build import Wiring, join
from wanrt.pipeline.context import AnchorPolicy
from wanrt.pipeline.models import Stage0Models, hashed_embedding
from wanrt.script import Curve, RenderJob, Scene, Timeline, load_preset
from wanrt.telemetry import Recorder

CPU = torch.device("cpu")
SEVEN_CHUNKS = 9 + 6 * 12


@pytest.fixture(scope="module")
def job():
    preset = load_preset("wan-tiny")
    transformer = preset.transformer.model_copy(
        update={"dim": 48, "ffn_dim": 96, "num_layers": 2, "text_dim": 32}
    )
    vae = preset.vae.model_copy(update={"base_dim": 4, "num_res_blocks": 1})
    preset = preset.model_copy(update={"transformer": transformer, "vae": vae})
    scenes = (
        Scene((("a ball", 1.0),), 0, 0),
        Scene((("a star", 0.7), ("a sunset", 0.3)), 40, 4, Fraction(24), Curve.SLERP),
    )
    return RenderJob(
        preset=preset, timeline=Timeline(scenes), seed=3, width=48, height=32, fps=Fraction(16), frames=SEVEN_CHUNKS,
        steps=preset.steps, window=3, bias=1.0, anchor="anchor-only",
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(job):
    torch.manual_seed(0)
    transformer = WanTransformer(job.preset.transformer_config()).eval().requires_grad_(False)
    vae = WanVae(job.preset.vae_config()).eval().requires_grad_(False)
    return Stage0Models(vae, lambda prompt: hashed_embedding(24, 32, CPU, prompt)), transformer


@pytest.fixture(scope="module")
def make(models):
    def make(job):
        """Latents of all chunks and all frames of a job."""
        pipeline = join(job, *models, CPU, Wiring(Recorder()))
        latents, receive = [], pipeline._mesh.receive

        def listening():
            result = receive()
            latents.append(result.latents.clone())
            return result

        pipeline._mesh.receive = listening
        pixels = torch.cat([frames.pixels for frames in pipeline.run()])
        return torch.cat(latents, dim=2), pixels

    return make


@pytest.mark.parametrize("window", [1, 3, 4, 6])
@pytest.mark.parametrize("bias", [1.0, 0.3])
def test_exact_policies_are_bit_identical(job, make, window, bias):
    jobs = [
        replace(job, window=window, bias=bias, anchor=a) for a in ("decode-all", "overlap", "anchor-only")
    ]
    (latents, pixels), *others = [make(j) for j in jobs]
    assert pixels.shape == (SEVEN_CHUNKS, 32, 48, 3)
    for other_latents, other_pixels in others:
        assert torch.equal(latents, other_latents)
        assert torch.equal(pixels, other_pixels)


def test_the_other_policies_differ(job, make):
    exact, _ = make(job)
    for anchor in ("latent", "first-frame"):
        other, _ = make(replace(job, anchor=anchor))
        assert torch.equal(exact[:, :, :6], other[:, :, :6])  # no anchor before chunk 2
        assert not torch.equal(exact[:, :, 6:], other[:, :, 6:])


def test_matches_a_loop_without_streaming(job, models, make):
    """Everything from scratch: whole-video decodes, plain forwards on a fresh cache for every chunk."""
    from wanrt.models.kv_cache import CachePolicy, KVCache, Pass
    from wanrt.pipeline.conditioning import lerp, slerp
    from wanrt.pipeline.noise import noise

    sigmas = [t / 1000 for t in (1000, 937.5, 833.33333, 625)]
    config, latents = job.preset.transformer_config(), []
    stage0, transformer = models

    def embedding(chunk):
        ball, star, sunset = (stage0.encode(text) for text in ("a ball", "a star", "a sunset"))
        if chunk < 4:
            return ball
        fraction = {4: 6 / 24, 5: 18 / 24}.get(chunk, 1.0)
        return slerp(ball, lerp(star, sunset, 0.3), fraction)

    def decode(count):
        state = stage0.vae.decoder_state()
        return torch.cat([stage0.vae.decode(z, state) for z in latents[:count]], dim=2)

    for chunk in range(7):
        cache = KVCache.allocate(config, policy=CachePolicy.RECOMPUTE, frames=3, grid=(2, 3))
        text = transformer.embed_text(embedding(chunk))
        if chunk:
            first = latents[0] if chunk == 1 else stage0.vae.encode_frame(decode(3 * chunk - 2)[:, :, -1:])
            context = torch.cat([first, *latents[-2:]], dim=2)
            transformer(context, torch.zeros(1, 3), text, cache, pass_=Pass.CONTEXT)
        x = noise(job.seed, chunk, 0, (1, 16, 3, 4, 6))
        for i, sigma in enumerate(sigmas):
            t = torch.full((1, 3), 1000.0 * sigma)
            clean = x - sigma * transformer(x, t, text, cache, pass_=Pass.DENOISE)
            if i < 3:
                x = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * noise(job.seed, chunk, i + 1, x.shape)
        latents += list(clean.split(1, dim=2))

    exact = replace(job, steps=tuple(1000 * s for s in sigmas), frames=SEVEN_CHUNKS)
    got, pixels = make(exact)
    want = torch.cat(latents, dim=2)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())
    error = (pixels.float() - (decode(21)[0].permute(1, 2, 3, 0) + 1) * 127.5).abs().max().item()
    assert error < 1.0


@pytest.mark.parametrize("policy", ["rolling", "sink"])
def test_rolling_and_sink_caches(job, make, policy):
    cache = job.preset.cache.model_copy(update={"policy": policy, "sink": 3 if policy == "sink" else 0})
    rolling = replace(job, preset=job.preset.model_copy(update={"cache": cache}), window=6)
    latents, pixels = make(rolling)
    assert torch.isfinite(latents).all()
    assert pixels.shape[0] == SEVEN_CHUNKS
    again, _ = make(rolling)
    assert torch.equal(latents, again)
    short, short_pixels = make(replace(rolling, frames=30))
    assert torch.equal(short, latents[:, :, : short.shape[2]])
    assert torch.equal(short_pixels, pixels[:30])


def test_prefix(job, make):
    long, short = make(job)[1], make(replace(job, frames=40))[1]
    assert torch.equal(short, long[:40])


@pytest.mark.parametrize("policy", list(AnchorPolicy))
def test_two_pipelines_share_weights_and_nothing_else(job, models, policy):
    build = lambda seed: join(replace(job, seed=seed, anchor=policy.value), *models, CPU, Wiring(Recorder()))  # noqa: E731
    alone = torch.cat([f.pixels for f in build(3).run()])
    one, other = build(3).run(), build(4).run()
    woven = []
    for frames in one:
        woven.append(frames.pixels)
        next(other, None)
    assert torch.equal(torch.cat(woven), alone)
