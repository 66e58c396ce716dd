from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from wanrt.models.transformer import TransformerConfig, WanTransformer
from wanrt.models.vae import VaeConfig, WanVae
from wanrt.pipeline.context import AnchorPolicy, Head, context_plan
from wanrt.tiny import training, transformer_training, vae_training
from wanrt.tiny.corpus import CHUNKS, FRAMES, NO_CUT, cut_frame, encode_corpus, plan_clips
from wanrt.tiny.rollout import STEPS, Roller
from wanrt.tiny.training import Budget, Clock, Ranks, make_run, newton_schulz
from wanrt.tiny.transformer_training import (
    OwnPast,
    TransformerRecipe,
    TransformerTrainer,
    draw_sigmas,
    phase_of,
)
from wanrt.tiny.vae_training import VaeRecipe, VaeTrainer, boxes, psnr
from wanrt.tiny.world import PERIOD, World

CPU = Ranks(0, 1, torch.device("cpu"))
SMALL_VAE = VaeConfig(base_dim=8, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)


@pytest.fixture
def small(monkeypatch):
    """The models of the trainers at toy size."""
    config = TransformerConfig(
        dim=32,
        ffn_dim=32,
        num_layers=2,
        num_heads=4,
        text_dim=transformer_training.TEXT_CONFIG.dim,
        text_len=32,
    )
    monkeypatch.setattr(vae_training, "VAE_CONFIG", SMALL_VAE)
    monkeypatch.setattr(transformer_training, "TRANSFORMER_CONFIG", config)


VAE_RECIPE = VaeRecipe(
    budget=Budget(steps=3, warmup=2),
    crop=16,
    frames=5,
    batch=1,
    whole_batch=1,
    whole_frames=5,
    half=False,
    height=32,
    width=48,
    optimizer="muon",
    whole_from=0.5,
)


@pytest.fixture(scope="module")
def corpus(assets):
    torch.manual_seed(0)
    return encode_corpus(
        WanVae(SMALL_VAE), World(32, 48), assets / "tokenizer.json", seed=3, count=6, half=False
    )


def finish(trainer, out):
    trainer.train(out)
    return [p.detach().clone() for p in trainer.run.params]


def interrupted(make, tmp_path, steps):
    """Weights of a run, and of the same run stopped after `steps` and resumed from its checkpoint."""
    whole = finish(make(), tmp_path / "whole")
    first = make()
    clock_at = Clock.at

    def stopping(self, step):
        return clock_at(self, step) if step < steps else 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "at", stopping)
        first.train(tmp_path)
    name = "vae.pt" if isinstance(first, VaeTrainer) else "transformer.pt"
    second = make()
    second.run.restore(training.load(tmp_path / name))
    assert second.run.step == steps
    return whole, finish(second, tmp_path / "rest")


def test_the_vae_run_resumes_bit_for_bit(small, tmp_path):
    whole, resumed = interrupted(lambda: VaeTrainer(VAE_RECIPE, CPU), tmp_path, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_transformer_run_resumes_bit_for_bit(small, corpus, tmp_path):
    recipe = TransformerRecipe(budget=Budget(steps=4, warmup=2), batch=2, half=False)
    vae = WanVae(SMALL_VAE)
    whole, resumed = interrupted(lambda: TransformerTrainer(recipe, corpus, vae, CPU), tmp_path, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_self_rollouts_train(small, corpus, tmp_path):
    recipe = TransformerRecipe(
        budget=Budget(steps=3, warmup=1),
        batch=4,
        half=False,
        rollout_from=0.0,
        rollout_batch=2,
        rollout_chunks=3,
    )
    trainer = TransformerTrainer(recipe, corpus, WanVae(SMALL_VAE), CPU)
    trainer.train(tmp_path)
    assert trainer.past.kept
    assert all(torch.isfinite(p).all() for p in trainer.run.params)


def test_own_pasts_have_the_truth_of_their_phase(small, corpus):
    past = OwnPast(corpus, WanVae(SMALL_VAE), batch=2, chunks=7, seed=1, rank=0)
    learner = transformer_training.Learner()
    for _ in range(7):
        past.refresh(learner, half=False)
    assert [int(k[1][0]) for k in past.kept] == [1, 2, 3, 4, 5, 2]
    for made in range(2, 12):
        assert (cut_frame(made) - cut_frame(phase_of(made))) % PERIOD == 0


def test_the_corpus_has_the_pipelines_context(corpus):
    clip = torch.arange(len(corpus))
    for chunk in range(1, CHUNKS):
        plan = context_plan(chunk, 3, AnchorPolicy.ANCHOR_ONLY)
        context = corpus.context(clip, torch.full_like(clip, chunk))
        assert context.shape[2] == plan.frames
        for i, index in enumerate(plan.latents):
            if i == 0 and plan.head is Head.ANCHOR:
                assert torch.equal(context[:, :, 0], corpus.anchors[:, chunk].float())
            else:
                assert torch.equal(context[:, :, i], corpus.latents[:, index].float())


def test_the_corpus_anchors_the_right_frame(assets):
    torch.manual_seed(0)
    vae, world, seed = WanVae(SMALL_VAE), World(32, 48), 9
    corpus = encode_corpus(vae, world, assets / "tokenizer.json", seed=seed, count=1, half=False)
    plan = plan_clips(seed, 1)
    chunk = 3
    latent = context_plan(chunk, 3, AnchorPolicy.ANCHOR_ONLY).anchor
    frame = 4 * latent  # the last of the pixel frames 4 latent - 3 .. 4 latent
    scenes = plan.first if frame < cut_frame(int(plan.cut[0])) or int(plan.cut[0]) == NO_CUT else plan.second
    pixels, _ = world.render(scenes, torch.tensor([frame]))
    torch.testing.assert_close(
        corpus.anchors[:, chunk].float(), vae.encode_frame(pixels)[:, :, 0], rtol=0, atol=0.02
    )


def test_cuts_change_the_caption_at_their_chunk(corpus):
    clip = torch.arange(len(corpus))
    cut = clip[corpus.cut != NO_CUT]
    for chunk in range(CHUNKS):
        at = torch.full_like(cut, chunk)
        _, labels = corpus.text(cut, at, torch.zeros_like(cut))
        expected = torch.where((at >= corpus.cut[cut])[:, None], corpus.labels[cut, 1], corpus.labels[cut, 0])
        assert torch.equal(labels, expected)


def test_cut_frames_are_chunk_starts():
    starts = [context_plan_start(c) for c in range(CHUNKS)]
    assert [cut_frame(c) for c in range(CHUNKS)] == starts
    assert FRAMES == 9 + 12 * (CHUNKS - 1)


def context_plan_start(chunk):
    from wanrt.pipeline.context import first_pixel_frame

    return first_pixel_frame(3 * chunk)


def test_sigmas_favour_the_samplers_own():
    g = torch.Generator().manual_seed(1)
    own = draw_sigmas(4000, 1.0, g)
    assert len(own.unique()) == len(STEPS)
    mixed = draw_sigmas(4000, 0.6, g)
    share = torch.isin(mixed, own.unique()).float().mean()
    assert 0.55 < share < 0.65
    assert mixed.min() >= 0
    assert mixed.max() <= 1


def test_rollouts_equal_the_pipelines_rule():
    """Contexts of a rollout, chunk by chunk, against the plan and the VAE by hand."""
    torch.manual_seed(1)
    config = TransformerConfig(dim=32, ffn_dim=32, num_layers=1, num_heads=4, text_dim=8, text_len=4)
    model, vae = WanTransformer(config).eval(), WanVae(SMALL_VAE).eval()
    roller = Roller(model, vae)
    streams, g = roller.start(2, (4, 6)), torch.Generator().manual_seed(2)
    text = roller.embed(torch.randn(2, 4, 8))
    made, anchors = [], {}
    state = vae.decoder_state()
    for chunk in range(4):
        context = streams.context()
        plan = context_plan(chunk, 3, AnchorPolicy.ANCHOR_ONLY)
        assert (context is None) == (plan.frames == 0)
        if context is not None:
            latents = torch.cat(made, 2)
            assert torch.equal(context[:, :, 1:], latents[:, :, list(plan.latents[1:])])
            head = latents[:, :, :1] if plan.anchor is None else anchors[plan.anchor]
            torch.testing.assert_close(context[:, :, :1], head)
        made.append(roller.make(streams, text, g, (4, 6)))
        roller.accept(streams, made[-1])
        for i in range(3):
            pixels = vae.decode(made[-1][:, :, i : i + 1], state)
            anchors[3 * chunk + i] = vae.encode_frame(pixels[:, :, -1:])


def test_newton_schulz_orthogonalises():
    g = torch.Generator().manual_seed(1)
    for shape in ((3, 24, 24), (2, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(shape, generator=g)))
        # The quintic iteration is tuned for speed: singular values end within 0.6..1.25 (Jordan et al. 2024).
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_gradients_are_clipped_and_nans_dropped():
    layer = nn.Linear(4, 4)
    run = make_run(list(layer.named_parameters()), optimizer="adamw", lr=1e-2)
    run.gradients.flat.fill_(10.0)
    run.gradients.reduce_and_clip_(CPU, 1.0)
    assert float(run.gradients.flat.norm()) == pytest.approx(1.0, rel=1e-4)
    run.gradients.flat[0] = float("nan")
    run.gradients.reduce_and_clip_(CPU, 1.0)
    assert run.gradients.flat.abs().max() == 0


def test_rates_rise_then_fall():
    budget = Budget(steps=100, warmup=10, floor=0.1)
    rates = [budget.rate(i, i / 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.05)
    assert max(rates) > 0.95
    assert rates[-1] < 0.15


def test_boxes_and_psnr():
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[0, 0, 0, 2, 3], mask[0, 0, 0, 4, 5] = 1, 1
    box = boxes(mask)
    assert box[0, 0, 0].sum() == 9
    assert box[0, 0, 1].sum() == 0
    error = torch.full((1, 3, 2, 8, 8), 0.2)
    assert psnr(error, torch.ones_like(mask)) == pytest.approx(20.0, abs=1e-4)


def test_the_start_is_close_to_an_identity(small):
    trainer = VaeTrainer(replace(VAE_RECIPE, height=64, width=96), CPU)
    pixels, mask = vae_training.training_clips(World(64, 96), 4, 3, 5, "train")
    with torch.no_grad():
        mean, _ = trainer.vae.encode_train(pixels)
        wired = psnr(trainer.vae.decode_train(mean) - pixels, torch.ones_like(mask))
        torch.manual_seed(1)
        plain = WanVae(SMALL_VAE)
        default = psnr(plain.decode_train(plain.encode_train(pixels)[0]) - pixels, torch.ones_like(mask))
    assert wired > 14
    assert wired > default + 3
