"""probe-vae on sound VAEs, on VAEs with planted faults, and its page, JSON and command."""

import copy
import dataclasses
import html.parser
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wanrt.cli import app
from wanrt.errors import UsageError
from wanrt.models.vae import CausalConv3d, Upsample, VaeConfig, VaeState, WanVae
from wanrt.probes import vae_command
from wanrt.probes.vae_anchor import anchor
from wanrt.probes.vae_cost import cost, group_of
from wanrt.probes.vae_open import open_subject
from wanrt.probes.vae_partial import (
    Verdict,
    decoder_causality,
    encoder_causality,
    single_latent,
    workarounds,
)
from wanrt.probes.vae_probe import choose, probe
from wanrt.probes.vae_reach import decoder_reach, encoder_reach, warm_up
from wanrt.probes.vae_subject import Subject, moving_picture, randomise, streaming_subject

GRID = (4, 3)


def make_subject(**config: object) -> Subject:
    settings = {"base_dim": 4, "num_res_blocks": 1, **config}
    vae = WanVae(VaeConfig(**settings)).eval().requires_grad_(False)
    randomise(vae, seed=1)
    return streaming_subject(vae, "small", "random", size=(32, 24))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject()


# --- a sound VAE ------------------------------------------------------------------------------------------


def test_t1_is_conditional_on_carried_state(subject: Subject) -> None:
    result = single_latent(subject, grid=GRID)
    assert result.verdict is Verdict.CONDITIONAL
    assert "bit for bit" in result.condition
    assert [s.frames for s in result.carried] == [1, 4, 4, 4, 4]
    assert all(s.bit_identical and s.error <= 1e-4 for s in result.carried)
    assert [s.frames for s in result.fresh] == [1, 1, 1, 1, 1]
    assert all(s.error > 0.01 for s in result.fresh[1:])


def test_both_halves_are_causal(subject: Subject) -> None:
    decoder, encoder = decoder_causality(subject, grid=GRID), encoder_causality(subject, grid=GRID)
    assert decoder.causal
    assert encoder.causal
    assert decoder.bleed == encoder.bleed == 0
    assert decoder.last_frame_error <= 1e-4
    # latent 2 of 5 is felt from its own first frame, 5, on
    assert decoder.change[2][4] == 0 < decoder.change[2][5]
    # pixel frame 5 belongs to latent 2
    assert encoder.change[5][1] == 0 < encoder.change[5][2]


def test_receptive_field_of_the_full_depth_is_38_latents_and_112_frames() -> None:
    """Wan2.1's own depth; its width does not matter. 37 latents for the frame that becomes the anchor."""
    subject = make_subject(base_dim=2, num_res_blocks=2)
    decoder, encoder = decoder_reach(subject), encoder_reach(subject)
    assert decoder.complete
    assert encoder.complete
    assert (decoder.history, decoder.history_by_phase) == (38, (38, 38, 37, 37))
    assert encoder.history == 112
    assert decoder.future == encoder.future == 0


SHALLOW = {"dim_mult": (1, 2), "temporal_downsample": (True,)}


def test_reach_agrees_with_brute_force() -> None:
    """On a VAE shallow enough to perturb every latent and to find the last frame that still moves."""
    subject = dataclasses.replace(make_subject(**SHALLOW), temporal_factor=2, spatial_factor=2)
    reach = decoder_reach(subject, latents=44)
    subject.module.double()
    clip = torch.randn(1, 16, 44, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = subject.decode_whole(clip)
    changed = clip.clone()
    changed[:, :, 3] += 1
    moved = (subject.decode_whole(changed) - plain).abs().amax((0, 1, 3, 4))
    last = int(moved.nonzero().max())
    assert reach.complete
    assert reach.history == 1 + (last - 1) // 2 - 3
    subject.module.float()


def test_layers_reach_further_one_after_the_other(subject: Subject) -> None:
    layers = decoder_reach(subject, latents=36).layers
    assert layers[0].layer == "conv1"
    assert (layers[0].frames, layers[0].latents) == (2, 2)
    assert [row.latents for row in layers] == sorted(row.latents for row in layers)
    assert all(row.latents_at["0.01"] <= row.latents_at["0.001"] <= row.latents for row in layers)


def test_warm_up_is_exact_from_the_receptive_field_on(subject: Subject) -> None:
    history = decoder_reach(subject, latents=36).history
    result = warm_up(subject, latents=history + 3)
    needed = result.needed
    assert needed["1e-2"] <= needed["1e-3"] <= needed["rounding"] <= history
    assert result.errors[history] <= 1e-6
    assert result.minimum_t == needed["rounding"] + 1


def test_workarounds_are_wrong_and_carried_state_is_not(subject: Subject) -> None:
    rows = {row.name: row for row in workarounds(subject, latents=10, grid=GRID)}
    assert rows["carried state"].error <= 1e-4
    assert rows["carried state"].latents_decoded == 1
    assert rows["T=2, first discarded"].latents_decoded == 2
    assert rows["T=2, first discarded"].error > 0.01
    assert rows["overlap of 8"].rms < rows["overlap of 2"].rms


def test_cost_counts_all_arithmetic_once(subject: Subject) -> None:
    result = cost(subject, whole=3)
    runs = {run.name: run for run in result.runs}
    assert set(runs) == {
        "first latent, T=1",
        "steady latent, T=1",
        "steady chunk, T=3",
        "whole clip, T=3",
        "encode one frame",
    }
    one, three = (
        sum(layer.gflop for layer in runs[name].layers)
        for name in ("steady latent, T=1", "steady chunk, T=3")
    )
    assert three == pytest.approx(3 * one)
    latents = torch.zeros(1, 16, 3, 3, 4)
    with FlopCounterMode(display=False) as counter:
        subject.decode_whole(latents)
    whole = sum(layer.gflop for layer in runs["whole clip, T=3"].layers)
    assert whole == pytest.approx(counter.get_total_flops() / 1e9)
    for run in result.runs:
        groups = run.by_group()
        assert sum(row.milliseconds for row in groups.values()) == pytest.approx(
            sum(layer.milliseconds for layer in run.layers)
        )
        pixels = 4 * 3 * run.frames * 24 * 32 / 1e6  # fp32, RGB
        assert run.live_megabytes == max(row.live_megabytes for row in groups.values())
        if run.name != "encode one frame":
            assert run.live_megabytes > pixels
    assert runs["steady latent, T=1"].live_megabytes < runs["whole clip, T=3"].live_megabytes


def test_groups_by_place() -> None:
    modules = dict(make_subject().module.named_modules())
    for path, group in {
        "decoder.conv1": "entry",
        "decoder.middle.0.residual.0": "norm",
        "decoder.middle.0.residual.2": "residual",
        "decoder.middle.1.norm": "attention",
        "decoder.middle.1.to_qkv": "attention",
        "decoder.upsamples.2.time_conv": "temporal",
        "decoder.upsamples.2.resample.1": "spatial",
        "decoder.head.2": "head",
    }.items():
        assert group_of(path, modules[path]) == group
    tiny = open_subject("taehv", device="cpu", dtype=torch.float32, seed=0).module
    modules = dict(tiny.named_modules())
    assert group_of("decoder.13.conv", modules["decoder.13.conv"]) == "temporal"
    assert group_of("decoder.3.conv.0", modules["decoder.3.conv.0"]) == "residual"


def test_anchor_of_a_lossless_vae_is_the_latent_itself() -> None:
    def same(clip: Tensor) -> Tensor:
        return clip

    lossless = dataclasses.replace(
        make_subject(),
        temporal_factor=1,
        decode_whole=same,
        encode_whole=same,
        encode_frame=same,
    )
    result = anchor(lossless, trips=3, grid=GRID)
    assert result.against_replaced == result.against_fresh == result.stream_against_fresh == 0
    assert [(t.count, t.latent_rms, t.psnr) for t in result.trips] == [(n, 0.0, 99.0) for n in (1, 2, 3)]


# --- planted faults ---------------------------------------------------------------------------------------


def test_a_decoder_that_sees_the_future_is_caught() -> None:
    """One convolution padded on both sides in time, as a VAE that is not causal has it."""
    subject = make_subject()
    conv = subject.module.decoder.upsamples[0].residual["2"]
    assert isinstance(conv, CausalConv3d)

    def symmetric(x: Tensor, state: object = None) -> Tensor:
        return torch.nn.functional.conv3d(x, conv.weight, conv.bias, padding=1)

    conv.forward = symmetric
    result = decoder_causality(subject, grid=GRID)
    assert not result.causal
    assert result.bleed > 1e-3
    assert single_latent(subject, grid=GRID).verdict is Verdict.NO
    assert encoder_causality(subject, grid=GRID).causal


def test_an_encoder_that_sees_the_future_is_caught() -> None:
    subject = make_subject()
    conv = subject.module.encoder.downsamples[0].residual["6"]
    conv.forward = lambda x, state=None: torch.nn.functional.conv3d(x, conv.weight, conv.bias, padding=1)
    assert not encoder_causality(subject, grid=GRID).causal


class WrongCache(VaeState):
    """krea-ai/realtime-video demo_utils/vae_block3.py:58 at acf4b7b: the first temporal up-sampler's cache gets the
    newest frame twice where the frame before and the newest belong."""

    path = ""

    def window(self, path: str, x: Tensor) -> Tensor:
        window = super().window(path, x)
        if path == self.path:
            before = window[:, :, 1:2]
            self.slots[path][:, :, 0:1] = torch.where(before == 0, 0, x[:, :, -1:])
        return window


def test_a_wrong_cache_frame_as_in_kreas_block_decoder_is_caught() -> None:
    subject = make_subject()
    vae = subject.module
    path = next(
        f"{name}.time_conv"
        for name, module in vae.named_modules()
        if isinstance(module, Upsample) and module.time_conv is not None
    )

    def faulty() -> VaeState:
        state = WrongCache("decoder")
        state.path = path
        return state

    vae.decoder_state = faulty
    result = single_latent(streaming_subject(vae, "krea", "random"), grid=GRID)
    assert result.verdict is Verdict.NO
    # latents 0 to 2 are right: latent 2 is the first whose wrong frame is stored, latent 3 the first to read it
    assert [s.error <= 1e-4 for s in result.carried] == [True, True, True, False, False]
    assert "latent 3 already departs" in result.condition


def test_a_stream_that_forgets_is_caught() -> None:
    subject = make_subject()
    forgetful = dataclasses.replace(subject, open_decoder=lambda: subject.decode_call)
    result = single_latent(forgetful, grid=GRID)
    assert result.verdict is Verdict.NO
    assert "latent 1" in result.condition


def test_a_history_dropped_in_one_layer_is_seen_in_the_reach() -> None:
    """One convolution that ignores its past: two frames less."""
    whole = make_subject(**SHALLOW)
    cut = copy.deepcopy(whole.module)
    cut.decoder.conv1.weight[:, :, :2] = 0
    lists = [
        dataclasses.replace(streaming_subject(vae, "x", "y"), temporal_factor=2, spatial_factor=2)
        for vae in (whole.module, cut)
    ]
    full, less = (decoder_reach(s, latents=44).history for s in lists)
    assert less == full - 2


# --- report, page, command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(subject: Subject):
    quick = [name for name in choose(None) if name != "receptive-field"]
    return probe(subject, quick)


class Balanced(html.parser.HTMLParser):
    """Fails on unbalanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_from_elsewhere(report) -> None:
    from wanrt.probes.vae_page import page

    text = page(report)
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert "<script" not in text
    assert "CONDITIONAL" in text
    assert text.count("<svg") >= 5


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_page_draws_in_chromium(report, tmp_path: Path) -> None:
    from PIL import Image

    from wanrt.probes.vae_page import page

    source, picture = tmp_path / "p.html", tmp_path / "p.png"
    source.write_text(page(report))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,2600"]
    subprocess.run(
        ["chromium", *flags, f"--screenshot={picture}", source.as_uri()], check=True, capture_output=True
    )
    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert len(colours) > 50
    assert any(count > 500 and colour == (0x2F, 0x6F, 0xDB) for count, colour in colours)  # a plot


def test_json_is_plain_data(report) -> None:
    text = json.dumps(report.as_dict(), allow_nan=False)
    findings = {f["question"]: f for f in json.loads(text)["findings"]}
    assert findings["t1"]["verdict"] == "CONDITIONAL"
    assert findings["causality"]["data"]["decoder"]["causal"] is True


def test_verdicts_come_first_on_the_terminal(report) -> None:
    from rich.console import Console

    from wanrt.probes.vae_report import render

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(render(report))
    lines = console.export_text().splitlines()
    assert "CONDITIONAL" in lines[1]
    assert any("Slowest layers" in line for line in lines[8:])


def test_command_prints_json_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    request = vae_command.Request(only="t1", json=True, html=page, device="cpu", random_weights=True)
    vae_command.run(request)
    assert json.loads(capsys.readouterr().out)["findings"][0]["verdict"] == "CONDITIONAL"
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae", "nothing"], "--vae: got 'nothing', expected one of wan-tiny"),
        (["--vae", "diffusers:Nothing"], "expected one of AutoencoderKLWan"),
        (["--only", "t1,t2"], "--only: got 't2'"),
        (["--size", "100x3"], "--size: got 100x3, expected multiples of 8"),
        (["--size", "big"], "--size: got 'big', expected WIDTHxHEIGHT"),
        (["--precision", "fp8"], "--precision: got 'fp8'"),
        (["--into", "x.md"], "--into needs --all"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        app.run(["probe-vae", "--device", "cpu", *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_taehv_opens_and_is_judged() -> None:
    taehv = open_subject("taehv", device="cpu", dtype=torch.float32, seed=0)
    result = single_latent(taehv, latents=3, grid=(2, 2))
    assert result.verdict is Verdict.CONDITIONAL
    assert taehv.weights == "random weights, seed 0"


def test_moving_picture_moves_and_stays_in_range() -> None:
    clip = moving_picture(5, 16, 24)
    assert clip.shape == (1, 3, 5, 16, 24)
    assert clip.abs().max() <= 1
    assert (clip[:, :, 1:] - clip[:, :, :-1]).abs().amax((0, 1, 3, 4)).min() > 0.01


def test_unknown_questions_are_refused() -> None:
    with pytest.raises(UsageError, match="expected some of t1, causality"):
        choose("speed")
