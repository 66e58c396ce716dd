"""The simulator against every run of wanrt bench that is kept: a run's own stage costs give its period."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanrt.telemetry.simulator import StageCosts, simulate

MEASUREMENTS = Path(__file__).parents[1] / "measurements"
RUNS = [
    pytest.param(run, id=f"{path.stem} {number} {run['name']}")
    for path in sorted(MEASUREMENTS.glob("*.json"))
    for number, run in enumerate(json.loads(path.read_text(encoding="utf-8")).get("runs", []))
    if "costs" in run
]


def test_there_are_runs_of_both_models_and_of_several_devices():
    made = [run.values[0]["settings"] for run in RUNS]
    assert {"krea-14b", "self-forcing-1.3b"} <= {settings["preset"] for settings in made}
    topologies = {"single", "tp=2", "ulysses=2", "tp=2+vae=2", "ulysses=2+vae=2", "pp1+tp=1"}
    assert topologies <= {settings["topology"] for settings in made}


@pytest.mark.parametrize("run", RUNS)
def test_a_runs_stage_costs_give_its_period(run):
    made = run["settings"]
    pp1 = made["topology"].startswith("pp1")
    predicted = simulate(StageCosts(**run["costs"]), made["anchor"], pp1=pp1, window=made["window"])
    assert predicted.period == pytest.approx(run["period"]["p50_ms"], rel=0.1)
