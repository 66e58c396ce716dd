"""The VAE beside other implementations of it: who is measured, who is not and why, and what is written down."""

import contextlib
import json
import sys

import pytest
import torch

from wanrt.cli import app
from wanrt.errors import RunError, UsageError
from wanrt.models.vae import VaeConfig
from wanrt.pipeline.bench_report import Timing, Unmeasured
from wanrt.pipeline.devices import choose_precision
from wanrt.probes import vae_entrants, vae_race
from wanrt.probes.vae_entrants import CALLS, Course, UnavailableError, diffusers_twin, fastvae_entrant
from wanrt.probes.vae_race import FULL_SIZE, _jobs, race, run_race
from wanrt.probes.vae_race_report import Race, RaceRun
from wanrt.probes.vae_stopwatch import Repetitions, relative_error
from wanrt.script import build_job, load_preset, read_script

CPU = torch.device("cpu")
TINY = {"preset": "wan-tiny", "size": "32x32", "device": "cpu"}
STREAMING = ["decode", "encode", "anchor", "chunk", "clip"]


def course(clip=4):
    job = build_job(read_script("a red ball"), {**TINY, "random_weights": True})
    return Course.of(job, CPU, choose_precision("auto", CPU), graphs=True, clip=clip)


def run_of(name, size, ms):
    calls = {call: Timing(p50, 2 * p50) for call, p50 in ms.items()}
    return RaceRun(size, name, "float16", calls, 1.0, 2.0, 831.27, 3129.9, 4000.0, 1e-3)


@pytest.fixture(scope="module")
def raced():
    """A race at a tiny size, and what was kept after each implementation."""
    kept = []
    found = race(_jobs(TINY), calls=2, warm_up=1, clip=4, keep=kept.append)
    return found, kept


# --- what is measured ---------------------------------------------------------------------------------------


def test_on_a_cpu_ours_and_diffusers_are_measured(raced):
    ours, plain, diffusers, fastvae = raced[0].runs
    assert (ours.implementation, diffusers.implementation) == ("wanrt", "diffusers")
    assert list(ours.calls) == STREAMING == list(CALLS)
    assert set(diffusers.calls) == {"encode", "clip"}
    assert all(0 < t.p50_ms <= t.p95_ms for run in (ours, diffusers) for t in run.calls.values())
    assert plain == Unmeasured("plain 32x32", "on a CPU it is what wanrt runs")
    assert fastvae == Unmeasured("fastvae 32x32", "needs a CUDA device")
    assert (ours.dtype, diffusers.dtype) == ("float32", "float32")
    assert (ours.peak_mib, ours.clip_peak_mib, diffusers.state_mib) == (None, None, None)


def test_the_state_is_the_decoders(raced):
    given = course()
    vae = given.weights()
    state = vae.decoder_state()
    vae.decode(given.latents, state)
    assert raced[0].runs[0].state_mib == pytest.approx(state.nbytes / 2**20)


def test_pixels_are_diffusers_own(raced):
    """fp32 on both sides: rounding alone, as in tests/models/test_vae.py."""
    ours, _, diffusers, _ = raced[0].runs
    assert 0 < ours.error_against_diffusers < 1e-4
    assert diffusers.error_against_diffusers == 0


def test_every_implementation_is_kept_as_soon_as_it_is_known(raced):
    found, kept = raced
    assert [len(part.runs) for part in kept] == [1, 2, 3, 4]
    assert kept[-1] == found


@torch.inference_mode()
def test_streaming_calls_never_start_a_stream():
    """A stream's first latent gives one frame and costs a fraction."""
    entrant = vae_entrants.open_wanrt(course())
    for _ in range(2):
        assert entrant.calls["decode"]().shape == (1, 3, 4, 32, 32)
        assert [piece.shape[2] for piece in entrant.calls["chunk"]()] == [4, 4, 4]
        assert entrant.calls["anchor"]().shape == (1, 16, 1, 4, 4)
        assert entrant.calls["encode"]().shape == (1, 16, 1, 4, 4)
        assert entrant.calls["clip"]().shape == (1, 3, 13, 32, 32)


@torch.inference_mode()
def test_the_anchor_path_is_decode_and_encode_of_the_last_frame():
    given = course()
    vae = given.weights()
    state = vae.decoder_state()
    vae.decode(given.latents[:, :, :1], state)
    want = vae.encode_frame(vae.decode(given.latents[:, :, 1:2], state)[:, :, -1:])
    assert torch.equal(vae_entrants.open_wanrt(given).calls["anchor"](), want)


@torch.no_grad()
def test_fastvae_decodes_the_same_pixels():
    """Its plain fallbacks, on the CPU: the weights and the scale of the latents arrive as they should."""
    package = pytest.importorskip("fastvae")
    given = course()
    got = fastvae_entrant(given, package).decode_clip(given.latents)
    want = vae_entrants.open_diffusers(given).decode_clip(given.latents)
    assert relative_error(got, want) < 1e-4


def test_relative_error_of_known_pixels():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_repetitions():
    assert Repetitions.of(8, 3, CPU) == Repetitions(3, 8, 2)
    assert Repetitions.of(16, 3, CPU).of_call("clip") == (1, 4)
    assert Repetitions.of(8, 3, torch.device("cuda", 0)) == Repetitions(3, 10, 10)
    assert Repetitions.of(20, 3, torch.device("cuda", 0)).of_call("decode") == (3, 20)


# --- what is not, and why -----------------------------------------------------------------------------------


def test_without_the_packages_the_rest_is_measured(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ours, _, diffusers, _ = race(_jobs(TINY), calls=2, warm_up=1, clip=4).runs
    assert diffusers == Unmeasured("diffusers 32x32", "not installed: pip install 'wanrt[test]'")
    assert ours.error_against_diffusers is None
    assert "pixels are compared with nothing: diffusers: not installed" in caplog.text


def test_a_broken_package_is_told_from_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "diffusers.py").write_text("import something_that_it_needs")
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UnavailableError, match="cannot be imported: No module named 'something_that_it_needs'"
    ):
        diffusers_twin(course().weights(), torch.float32)


def test_anothers_failure_is_a_line_and_ours_an_error(monkeypatch):
    def fail(given):
        raise ZeroDivisionError("of theirs\nin two lines")

    monkeypatch.setitem(vae_entrants.OPENERS, "diffusers", fail)
    found = race(_jobs(TINY), calls=2, warm_up=1, clip=4)
    assert found.runs[2] == Unmeasured("diffusers 32x32", "ZeroDivisionError: of theirs in two lines")
    monkeypatch.setitem(vae_entrants.OPENERS, "wanrt", fail)
    with pytest.raises(RunError, match="unexpected ZeroDivisionError"):
        race(_jobs(TINY), calls=2, warm_up=1, clip=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls": 1}, "1 calls after 3: expected at least 2 after at least 1"),
        ({"warm_up": 0}, "8 calls after 0"),
        ({"clip": 3}, "clip of 3 latents: expected at least 4"),
    ],
)
def test_too_little_to_measure_is_refastvae_entrant(options, message):
    with pytest.raises(UsageError, match=message):
        race(_jobs(TINY), **options)


def test_another_vae_is_refastvae_entrant(monkeypatch):
    (job,) = _jobs(TINY)
    vae = job.preset.vae.model_copy(update={"kind": "taehv"})
    other = vae_race.replace(job, preset=job.preset.model_copy(update={"vae": vae}))
    with pytest.raises(UsageError, match="preset wan-tiny: its VAE is taehv, expected Wan's"):
        race([other])


def test_torchrun_is_refastvae_entrant(monkeypatch):
    launched = {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
    }
    for name, value in {**launched, "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match="--vae under torchrun: expected one process"):
        run_race(TINY, 2, 1, None)


@pytest.mark.parametrize(
    "option",
    [
        ["--matrix", "two"],
        ["--topology", "single"],
        ["--anchor", "all"],
        ["--check"],
        ["--window", "3"],
        ["--resume"],
    ],
)
def test_options_of_the_transformer_are_refastvae_entrant(option, capsys):
    with pytest.raises(SystemExit) as ended:
        app.run(["bench", "--vae", *option])
    assert ended.value.code == app.WRONG_USE
    assert f"--vae with {option[0]}: expected the VAE alone" in capsys.readouterr().err


# --- sizes and documents ------------------------------------------------------------------------------------


def test_sizes():
    sizes = [(job.width, job.height) for job in _jobs({"preset": None, "size": None})]
    assert sizes == [(576, 320), (832, 480)]
    assert load_preset(FULL_SIZE).vae_config() == VaeConfig()
    (tiny,) = _jobs({"preset": "wan-tiny", "size": None})
    assert (tiny.width, tiny.height) == (224, 128)
    (one,) = _jobs({"preset": None, "size": "64x48"})
    assert (one.width, one.height, one.preset.name) == (64, 48, FULL_SIZE)


def test_ratios_are_over_ours_of_the_same_call_and_size():
    runs = (
        run_of("wanrt", "576x320", {"decode": 10.0, "encode": 2.0, "clip": 8.0}),
        run_of("diffusers", "576x320", {"encode": 3.0, "clip": 20.0}),
        run_of("wanrt", "832x480", {"decode": 20.0, "clip": 16.0}),
        run_of("plain", "832x480", {"decode": 50.0}),
        Unmeasured("fastvae 832x480", "needs a CUDA device"),
    )
    found = Race({"clip_latents": 21}, runs)
    written = json.loads(json.dumps(found.document()))
    assert [run.get("ratios") for run in written["runs"]] == [
        {"decode": 1, "encode": 1, "clip": 1},
        {"encode": 1.5, "clip": 2.5},
        {"decode": 1, "clip": 1},
        {"decode": 2.5},
        None,
    ]
    lines = found.table().splitlines()
    assert lines[0].split() == ["implementation", "call", "size", "ms", "p95", "x", "wanrt"]
    assert "diffusers       whole clip, a latent  576x320  20.00   40.00     2.50" in lines
    assert "not measured: fastvae 832x480: needs a CUDA device" in lines
    assert (
        "decoder state 831.3 MiB, peak 3130 MiB, with a whole clip 4000 MiB, error 1.0e-03" in found.table()
    )
    assert lines[-1] == "medians, ms; a whole clip is 21 latents; random weights"


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae_race, "CLIP_LATENTS", 4)
    out = tmp_path / "vae.json"
    size = ["--preset", "wan-tiny", "--size", "32x32", "--device", "cpu"]
    with contextlib.suppress(SystemExit):
        app.run(["bench", "--vae", *size, "--chunks", "2", "--warm-up", "1", "--json", str(out)])
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert set(written) == {"schema", "settings", "runs", "versions", "machine"}
    assert set(written["versions"]) == {"torch", "cudnn", "triton", "diffusers", "fastvae"}
    assert written["settings"]["vae"]["base_dim"] == 16
    assert written["settings"]["repetitions"] == {"warm_up": 1, "calls": 2, "clips": 2}
    ours = written["runs"][0]
    assert list(ours["calls"]) == STREAMING
    assert f"{ours['calls']['anchor']['p50_ms']:.2f}" in printed


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.timeout(600)  # cuDNN times its algorithms for three implementations
def test_at_full_size_ours_is_faster_than_diffusers():
    """A ratio of two medians of one run; fp16 beside fp32 without TF32 sets the bound of the error."""
    found = race(_jobs({"preset": None, "size": "576x320", "device": "cuda"}), calls=10, warm_up=2)
    runs = {run.implementation: run for run in found.runs if isinstance(run, RaceRun)}
    ours = runs["wanrt"]
    assert {"wanrt", "plain", "diffusers"} <= set(runs)
    assert list(ours.calls) == STREAMING == list(runs["plain"].calls)
    assert (ours.dtype, runs["diffusers"].dtype) == ("float16", "bfloat16")
    assert ours.clip_peak_mib >= ours.peak_mib > ours.state_mib > 0
    assert runs["diffusers"].ratios(ours)["clip"] > 1
    assert runs["diffusers"].ratios(ours)["encode"] > 1
    assert runs["plain"].ratios(ours)["decode"] > 1
    # 10 bits of a fraction against 7: ours cannot be farther off than diffusers is in its own usual precision
    assert 0 < ours.error_against_diffusers < runs["diffusers"].error_against_diffusers < 0.1
