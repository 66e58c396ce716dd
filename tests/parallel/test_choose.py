from __future__ import annotations

import json
from dataclasses import replace

import pytest

from wanrt.errors import UsageError
from wanrt.parallel.choose import Machine, candidates, forecast, resolve
from wanrt.parallel.hardware import Link
from wanrt.parallel.report import as_json, find_machine, make_plan, read_costs, text
from wanrt.parallel.topology import Topology
from wanrt.parallel.workload import GIB, Workload
from wanrt.script import build_job, read_script
from wanrt.telemetry.simulator import StageCosts

KREA = Workload(
    dim=5120, ffn_dim=13824, layers=40, heads=40, text_dim=4096, text_len=512, freq_dim=256,
    width=576, height=320, window=3, steps=4, recompute=True, element=2, vae_dim=96, text_encoder=5_680_000_000,
)  # fmt: skip


def h200(devices, link=Link.NVLINK):
    return Machine(devices, "NVIDIA H200", 141 * GIB, link)


def job(**flags):
    return build_job(read_script("a red ball"), {"preset": "krea-14b", **flags})


@pytest.mark.parametrize("link", list(Link))
@pytest.mark.parametrize("devices", [2, 4, 5, 8])
def test_auto_is_the_fastest_candidate(devices, link):
    machine = h200(devices, link)
    choice = resolve("auto", KREA, machine, "anchor-only")
    best = forecast(KREA, choice.topology, machine, "anchor-only").fps
    for other in candidates(KREA, machine):
        assert forecast(KREA, other, machine, "anchor-only").fps <= best + 1e-9
    assert "fastest by prediction" in choice.reason


@pytest.mark.parametrize("link", list(Link))
@pytest.mark.parametrize("n", [2, 4])
def test_ulysses_is_ahead_of_tensor_parallelism(n, link):
    rates = [
        forecast(KREA, Topology.parse(f"{k}={n}"), h200(n, link), "anchor-only").fps
        for k in ("ulysses", "tp")
    ]
    assert rates[0] > rates[1] * (1.03 if link is Link.NVLINK else 1.5)


def test_auto_splits_the_vae_where_that_shortens_the_period():
    choice = resolve("auto", KREA, h200(8), "anchor-only")
    whole = forecast(KREA, replace(choice.topology, vae=1), h200(8), "anchor-only")
    split = forecast(KREA, choice.topology, h200(8), "anchor-only")
    assert choice.topology.vae > 1
    assert split.period < whole.period
    words = (
        f"the VAE split in {choice.topology.vae} shortens the period of this mesh from {whole.period:.0f} to"
    )
    assert words in choice.reason
    unsplit = resolve("auto", replace(KREA, vae_splits=False), h200(8), "anchor-only")
    assert unsplit.topology.vae == 1
    assert "split" not in unsplit.reason


def test_the_ranks_that_were_started_are_used_up():
    with pytest.raises(UsageError, match=r"tp=2: 2 devices, but WORLD_SIZE = 5; start 2, or take ulysses=5"):
        resolve("tp=2", KREA, h200(5), "anchor-only", world=5)
    with pytest.raises(UsageError, match="single: 1 device, but WORLD_SIZE = 3; start 1, or take pp1"):
        resolve("single", KREA, h200(3), "anchor-only", world=3)
    assert resolve("auto", KREA, h200(3), "anchor-only", world=3).topology.devices == 3
    assert resolve("pp1+tp=2", KREA, h200(3), "anchor-only", world=3).reason == "as asked for"


RULE = [(1, "single"), (2, "ulysses=2"), (3, "pp1+ulysses=2"), (5, "pp1+ulysses=4")]


@pytest.mark.parametrize(("devices", "want"), RULE)
def test_the_rule_for_devices_without_figures(devices, want):
    choice = resolve("auto", KREA, Machine(devices, "some GPU", 200 * GIB), "anchor-only")
    assert str(choice.topology) == want


def test_memory_is_refused_before_anything_loads():
    words = r"topology ulysses=4: rank 0 needs about 4\d\.\d GiB, its device has 40\.0 GiB; fits: "
    with pytest.raises(UsageError, match=words):
        resolve("ulysses=4", KREA, Machine(4, "A100", 40 * GIB), "anchor-only")
    tight = Machine(4, "A100", 40 * GIB)
    chosen = resolve("auto", KREA, tight, "anchor-only").topology
    resolve(str(chosen), KREA, tight, "anchor-only")
    with pytest.raises(UsageError, match="smaller --size or a device with more memory"):
        resolve("auto", KREA, Machine(2, "small", 8 * GIB), "anchor-only")


def test_a_measured_run_is_carried_over():
    measured = StageCosts(mesh=950, decode=34, encode=6)
    one = forecast(KREA, Topology(), h200(1), "anchor-only", measured)
    assert one.period == pytest.approx(950 + 3 * 34 + 6)
    two = forecast(KREA, Topology.parse("ulysses=2"), h200(2), "anchor-only", measured)
    guess = [forecast(KREA, Topology.parse(t), h200(2), "anchor-only") for t in ("single", "ulysses=2")]
    gain = guess[1].fps_without_vae / guess[0].fps_without_vae
    assert two.fps_without_vae / one.fps_without_vae == pytest.approx(gain)
    unknown = Machine(2, "some GPU")
    assert forecast(KREA, Topology(), unknown, "anchor-only", measured).period == one.period
    assert forecast(KREA, Topology.parse("tp=2"), unknown, "anchor-only", measured) is None


def test_the_plan_of_eight_devices():
    plan = make_plan(job(size="576x320", topology="pp1+tp=4+vae=4"), h200(8))
    shown = text(plan)
    assert "topology   pp1+tp=4+vae=4 (as asked for)" in shown
    assert "0     stage 0, VAE part 0" in shown
    assert "7     mesh 3" in shown
    assert "sent by each mesh rank" in shown
    assert f"{plan.prediction.fps:.1f} fps" in shown
    document = json.loads(json.dumps(as_json(plan)))
    assert len(document["ranks"]) == 8
    assert document["prediction"]["bound"].startswith("the mesh")
    assert set(document["fps_by_policy"]) == {"decode-all", "overlap", "anchor-only", "latent", "first-frame"}


def test_a_plan_without_figures_says_how_to_get_them():
    shown = text(make_plan(job(topology="auto"), Machine(1, "some GPU", 80 * GIB)))
    assert "predicted  nothing; figures: none for some GPU (H100, H200 known); measure with" in shown


def test_the_machine_asked_about():
    assert find_machine(8, "H200", "host", 141) == Machine(8, "H200", 141 * GIB, Link.HOST)
    with pytest.raises(UsageError, match="--link infiniband: expected nvlink or host"):
        find_machine(2, "H200", "infiniband", None)
    assert find_machine(None, None, None, None).devices >= 1


def test_costs_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_costs(tmp_path / "missing.json")
    empty = '{"settings": {"topology": "single"}, "stats": {"chunks": 0, "stages": []}}'
    for content in ("", "[]", "{}", '{"runs": []}', empty):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UsageError, match="not a file of wanrt bench"):
            read_costs(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"settings": {"topology": "tp=2"}}')
    with pytest.raises(UsageError, match="topology tp=2; expected single"):
        read_costs(tmp_path / "bad.json")


def test_costs_of_a_bench(tmp_path):
    costs = {"mesh": 450.0, "decode": 17.0, "encode": 3.0, "convert": 1.0, "transfer": 0.0}
    document = {"runs": [{"settings": {"topology": "single"}, "costs": costs}]}
    (tmp_path / "bench.json").write_text(json.dumps(document))
    assert read_costs(tmp_path / "bench.json") == StageCosts(450, 17, 3, 1)


@pytest.mark.parametrize(
    ("devices", "device", "mesh"), [([], "auto", 500), (["GPU"], "auto", 464), (["GPU"], "cpu", 500)]
)
def test_display_work_beside_passes_is_taken_off_them(tmp_path, devices, device, mesh):
    """On a GPU two decodes of 17 ms and a conversion of 2 run while the passes do, and lengthen them."""

    def spans(**each):
        return {name: {"count": 4, "p50_ms": ms} for name, ms in each.items()}

    stages = [
        {"stage": "mesh", "spans": {"step": {"count": 16, "p50_ms": 125}}},
        {"stage": "stage0", "spans": spans(**{"anchor-decode": 17, "anchor-encode": 3, "convert": 2})},
    ]
    run = {
        "settings": {"topology": "single", "anchor": "anchor-only", "window": 3, "device": device},
        "machine": {"devices": devices},
        "stats": {"chunks": 4, "stages": stages},
    }
    (tmp_path / "stats.json").write_text(json.dumps(run))
    assert read_costs(tmp_path / "stats.json") == StageCosts(mesh, 17, 3, 2)


def test_every_element_counts():
    assert Workload.of(job(precision="fp32")) == replace(Workload.of(job()), element=4)
