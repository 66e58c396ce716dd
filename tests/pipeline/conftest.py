"""Tiny fake models: order-sensitive float arithmetic, so that a wrong context or a wrong order changes bits."""

from dataclasses import dataclass

import pytest
import torch

from wanrt.pipeline.codec import LocalCodec
from wanrt.pipeline.context import AnchorPolicy, latents_for
from wanrt.pipeline.loop import LoopSettings, Pipeline
from wanrt.pipeline.mesh import InProcessMesh, Mesh, MeshSettings
from wanrt.pipeline.pixels import PixelStage
from wanrt.pipeline.prompts import PromptBook
from wanrt.telemetry import Recorder

SHAPE = (1, 16, 3, 2, 3)


@dataclass(frozen=True)
class FakeConditioning:
    prompts: tuple = (("a", 1.0),)
    blend_from: tuple | None = None
    blend_fraction: float = 1.0
    curve: str = "lerp"
    bias: float | None = None
    steps: tuple | None = None
    seed: int | None = None


class FakeTimeline:
    """Two prompts with a two-chunk transition at chunk 2."""

    def at(self, chunk):
        if chunk < 2:
            return FakeConditioning()
        if chunk < 4:
            return FakeConditioning((("b", 1.0),), (("a", 1.0),), (chunk - 1) / 3, "slerp")
        return FakeConditioning((("b", 1.0),))


def fake_encode(text):
    return torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(ord(text)))


class FakeVae:
    """Causal: the state is a decaying sum of all latents so far. Counts its calls."""

    def __init__(self):
        self.decoded, self.encoded = 0, 0

    def decoder_state(self):
        return {"sum": None}

    def decode(self, latent, state):
        self.decoded += 1
        past = torch.zeros_like(latent) if state["sum"] is None else state["sum"]
        state["sum"] = torch.tanh(0.7 * past + latent)
        frames = 1 if past.count_nonzero() == 0 else 4
        ramp = torch.arange(1, frames + 1).view(1, 1, frames, 1, 1) / 4
        pixels = torch.sin(state["sum"][:, :3] * 2 + ramp * latent[:, 3:6])
        return pixels.repeat_interleave(8, -1).repeat_interleave(8, -2)

    def encode_frame(self, pixels):
        self.encoded += 1
        small = pixels[..., ::8, ::8]
        return torch.cat([small * k for k in (1.0, 0.5, -0.3, 0.9, 1.1, 0.2)], dim=1)[:, :16]


class FakeDenoiser:
    """Velocity from noise, context (order matters), text, bias and timestep. Logs what it was asked."""

    device = torch.device("cpu")

    def __init__(self):
        self.log, self._context, self._text, self._bias = [], None, None, 1.0

    def set_text(self, embedding):
        self.log.append("text")
        self._text = embedding.mean()

    def set_bias(self, bias):
        self._bias = bias

    def context(self, latents):
        self.log.append(f"context {latents.shape[2]}")
        weights = torch.arange(1, latents.shape[2] + 1).view(1, 1, -1, 1, 1) / 7
        self._context = (latents * weights).sum(2, keepdim=True)

    def denoise(self, latents, timestep):
        self.log.append(f"step {timestep:.0f}")
        context = 0 if self._context is None else self._bias * self._context
        return torch.tanh(latents * timestep / 700 + context + self._text)

    def commit(self, latents):
        self.log.append("commit")
        self._context = latents.mean(2, keepdim=True) + (0 if self._context is None else 0.5 * self._context)


@pytest.fixture
def fakes():
    return FakeTimeline, fake_encode, FakeVae, FakeDenoiser


@pytest.fixture
def fake_pipeline():
    """Builds a pipeline of fakes: (pipeline, vae, denoiser)."""

    def build(
        *, policy=AnchorPolicy.ANCHOR_ONLY, window=3, frames=69, seed=5, recompute=True, launch_on_submit=False,
        steps=(1000, 937.5, 833.3333, 625), vae=None, denoiser=None, recorder=None, bias=0.5, timeline=None,
    ):  # fmt: skip
        vae, denoiser = vae or FakeVae(), denoiser or FakeDenoiser()
        recorder = recorder or Recorder()
        policy = AnchorPolicy(policy)
        settings = MeshSettings(seed, 5.0, window, policy, recompute, SHAPE)
        mesh = InProcessMesh(Mesh(denoiser, settings, recorder), launch_on_submit=launch_on_submit)
        loop = LoopSettings(policy, window, recompute, frames, steps, bias)
        pixels = PixelStage(LocalCodec(vae), window if loop.anchors else None, recorder, chunks=loop.chunks)
        timeline = timeline or FakeTimeline()
        book = PromptBook(timeline, fake_encode, recorder)
        return Pipeline(timeline, book, pixels, mesh, loop, recorder), vae, denoiser

    return build


@pytest.fixture
def naive_video(fakes):
    """The whole loop in one plain function, nothing carried: every context and every pixel from scratch."""
    timeline, encode, vae_type, denoiser_type = fakes

    def whole_decode(latents):
        vae, state = vae_type(), vae_type().decoder_state()
        return torch.cat([vae.decode(z, state) for z in latents], dim=2)

    def embedding(chunk):
        from wanrt.pipeline.conditioning import slerp

        now = timeline().at(chunk)
        end = encode(now.prompts[0][0])
        return slerp(encode("a"), end, now.blend_fraction) if now.blend_from else end

    def video(policy, window, frames, seed, steps=(1000, 937.5, 833.3333, 625), bias=0.5):
        from wanrt.pipeline.noise import noise
        from wanrt.pipeline.schedule import nearest_sigma

        latents, anchors = [], []
        while len(latents) < latents_for(frames):
            denoiser, chunk = denoiser_type(), len(latents) // 3
            denoiser.set_text(embedding(chunk))
            denoiser.set_bias(bias)
            context = context_frames(latents, policy, window)
            if context:
                denoiser.context(torch.cat(context, dim=2))
            x = noise(seed, chunk, 0, SHAPE)
            for i, t in enumerate(steps):
                clean = x - nearest_sigma(t, 5.0) * denoiser.denoise(x, t)
                if i + 1 < len(steps):
                    s = nearest_sigma(steps[i + 1], 5.0)
                    x = (1 - s) * clean + s * noise(seed, chunk, i + 1, SHAPE)
            latents += list(clean.split(1, dim=2))
        anchors.clear()
        pixels = whole_decode(latents)[:, :, :frames]
        return torch.cat(latents, 2), ((pixels[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(
            1, 2, 3, 0
        )

    def context_frames(latents, policy, window):
        if not latents:
            return []
        recent = latents[1:][-(window - 1) :] if window > 1 else []
        if len(latents) - 3 < window or policy == "first-frame":
            return [latents[0], *recent]
        if policy == "latent":
            return latents[-window:]
        last_frame = whole_decode(latents[: len(latents) - window + 1])[:, :, -1:]
        return [vae_type().encode_frame(last_frame), *recent]

    return video


@pytest.fixture(scope="session")
def smaller_preset():
    """wan-tiny with a transformer and a VAE that load and run in no time, for random weights."""
    from wanrt.script import load_preset

    preset = load_preset("wan-tiny")
    transformer = preset.transformer.model_copy(update={"dim": 96, "ffn_dim": 192, "num_layers": 2})
    vae = preset.vae.model_copy(update={"base_dim": 8, "num_res_blocks": 1})
    return preset.model_copy(update={"transformer": transformer, "vae": vae})
