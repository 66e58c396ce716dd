"""A precision against its reference, step by step."""

import json

import pytest
import torch

from wanrt.errors import UsageError
from wanrt.models.fp8 import Fp8Linear, apply_fp8, dequantised_product, plan_for
from wanrt.pipeline import devices
from wanrt.pipeline.build import Tuning, settle_topology
from wanrt.pipeline.check import PairedDenoiser, check, run_check
from wanrt.pipeline.devices import Precision, choose_precision
from wanrt.pipeline.models import load_transformer
from wanrt.pipeline.progress import unheard
from wanrt.pipeline.schedule import nearest_sigma, predict_x0
from wanrt.script import build_job, read_script

FLAGS = {"size": "32x32", "random_weights": True, "device": "cpu"}


def job_of(**flags):
    return build_job(read_script("a red ball"), {**FLAGS, **flags})


class Fake:
    """Velocity is a multiple of the latents."""

    device = torch.device("cpu")

    def __init__(self, factor):
        self.factor, self.heard = factor, []

    def denoise(self, latents, timestep):
        return self.factor * latents

    def __getattr__(self, name):
        return lambda value: self.heard.append(name)


def test_known_errors():
    reference, tested = Fake(0.5), Fake(-0.5)
    pair = PairedDenoiser(reference, tested, shift=5.0)
    for call in ("set_text", "set_bias", "context", "commit"):
        getattr(pair, call)(torch.zeros(1))
    assert reference.heard == tested.heard == ["set_text", "set_bias", "context", "commit"]
    latents = torch.randn(1, 16, 3, 2, 2)
    for timestep in (1000.0, 625.0, 1000.0):
        assert torch.equal(pair.denoise(latents, timestep), 0.5 * latents), "the reference goes on"
    first, second, third = pair.steps(per_chunk=2)
    assert [(s.chunk, s.step, s.timestep) for s in (first, second, third)] == [
        (0, 0, 1000),
        (0, 1, 625),
        (1, 0, 1000),
    ]
    assert first.error == pytest.approx(2)  # (1 + 0.5) / (1 - 0.5) - 1
    sigma = nearest_sigma(625.0, 5.0)
    assert second.error == pytest.approx((1 + sigma / 2) / (1 - sigma / 2) - 1)
    assert first.cosine == pytest.approx(1)


def test_bf16_against_fp32(tmp_path):
    out = tmp_path / "check.json"
    printed = run_check({**FLAGS, "precision": "bf16"}, 2, Tuning(), str(out))
    assert printed.startswith("bf16 against fp32")
    found = json.loads(out.read_text())["check"]
    assert (found["precision"], found["reference"]) == ("bf16", "fp32")
    assert [(s["chunk"], s["step"]) for s in found["steps"]] == [(c, s) for c in range(2) for s in range(4)]
    assert all(1e-5 < s["error"] < 0.1 and s["cosine"] > 0.99 for s in found["steps"])


def test_the_same_precision_twice_has_no_error(monkeypatch):
    same = Precision(torch.float32, torch.float32, torch.float32)
    monkeypatch.setattr(devices, "choose_precision", lambda name, device: same)
    assert all(step.error == 0 for step in check(job_of(precision="bf16"), 1, Tuning()).steps)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_the_reference_itself_is_refused(precision):
    with pytest.raises(UsageError, match="--check with --precision fp32: that is the reference"):
        check(job_of(precision=precision), 1, Tuning())


def test_several_devices_are_refused():
    with pytest.raises(UsageError, match="--check with topology tp=2: expected single"):
        check(job_of(precision="bf16", topology="tp=2"), 1, Tuning())


def test_fp8_without_its_product_is_refused_before_anything_loads():
    cpu = torch.device("cpu")
    with pytest.raises(UsageError, match="precision fp8: cpu has no fp8 product; take --precision bf16"):
        choose_precision("fp8", cpu)
    with pytest.raises(UsageError, match="no fp8 product"):
        settle_topology(job_of(precision="fp8"), cpu)


def test_attention_that_cannot_run_is_refused_before_anything_loads():
    cpu = torch.device("cpu")
    said = "attention cudnn: cpu is not a CUDA device; take --attention auto"
    with pytest.raises(UsageError, match=said):
        settle_topology(job_of(attention="cudnn"), cpu)
    with pytest.raises(UsageError, match=said):  # a rank, for its own device
        load_transformer(job_of(attention="cudnn"), None, cpu, choose_precision("fp32", cpu), unheard)


def test_the_loaded_transformer_is_fp8_and_near_its_reference():
    """wan-tiny's own weights, the product emulated here as a CPU has none of its own."""
    cpu, job = torch.device("cpu"), build_job(read_script("a red ball"), {"device": "cpu"})
    from wanrt.pipeline.build import find_files

    fp8 = Precision(torch.bfloat16, torch.float32, torch.float32, fp8=True)
    model = load_transformer(job, find_files(job), cpu, fp8, unheard)
    layers = [m for m in model.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 8 * (job.preset.transformer.num_layers - 2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32, torch.float8_e4m3fn}


def test_wan_tiny_in_fp8_stays_near_fp32(monkeypatch):
    """Its real weights over two chunks: measured 0.024 to 0.035 a step."""
    import wanrt.pipeline.models as models

    kinds = {"fp32": Precision(*[torch.float32] * 3), "bf16": Precision(*[torch.float32] * 3, fp8=True)}
    monkeypatch.setattr(devices, "choose_precision", lambda name, device: kinds[name])
    monkeypatch.setattr(
        models, "put_in_fp8", lambda model: apply_fp8(model, plan_for(8), dequantised_product)
    )
    monkeypatch.setattr("wanrt.pipeline.check.REFERENCES", {"bf16": "fp32"})
    job = build_job(read_script("a red ball"), {"device": "cpu", "precision": "bf16"})
    steps = check(job, 2, Tuning()).steps
    print([f"{s.error:.3f}" for s in steps])
    assert all(1e-2 < s.error < 0.06 and s.cosine > 0.998 for s in steps)


def test_schedule_of_the_comparison_is_the_pipelines():
    noisy, velocity = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(predict_x0(noisy, velocity, nearest_sigma(1000.0, 5.0)), noisy - velocity)


@pytest.mark.gpu
def test_fp8_against_bf16_on_the_device():
    job = build_job(read_script("a red ball"), {"random_weights": True, "precision": "fp8"})
    steps = check(job, 2, Tuning()).steps
    assert all(1e-4 < s.error < 0.15 and s.cosine > 0.98 for s in steps)
