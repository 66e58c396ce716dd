"""Runs of several GPUs from the stage costs of one: those of a day's measurements on cards of one kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanrt.parallel.choose import Machine, forecast
from wanrt.parallel.hardware import Link
from wanrt.parallel.topology import Topology
from wanrt.parallel.workload import Workload
from wanrt.script import build_job, read_script
from wanrt.telemetry.simulator import StageCosts

FILE = Path(__file__).parents[1] / "measurements" / "h100-together.json"
RUNS = [
    run
    for run in json.loads(FILE.read_text(encoding="utf-8"))["runs"]
    if run["settings"]["preset"] == "krea-14b"
]


def kind(run):
    return tuple(run["settings"][key] for key in ("width", "height", "precision"))


ALONE = {kind(run): StageCosts(**run["costs"]) for run in RUNS if run["settings"]["topology"] == "single"}
OTHERS = [pytest.param(run, id=run["name"]) for run in RUNS if run["settings"]["topology"] != "single"]


@pytest.mark.parametrize("run", OTHERS)
def test_costs_of_one_device_give_the_period_of_several(run):
    made = run["settings"]
    flags = {
        "preset": made["preset"],
        "size": f"{made['width']}x{made['height']}",
        "precision": made["precision"],
    }
    work = Workload.of(build_job(read_script("a red ball"), flags))
    machine = Machine(
        2, run["machine"]["devices"][0], link=Link.HOST if "no-p2p" in run["name"] else Link.NVLINK
    )
    predicted = forecast(work, Topology.parse(made["topology"]), machine, made["anchor"], ALONE[kind(run)])
    assert predicted.period == pytest.approx(run["period"]["p50_ms"], rel=0.05)
