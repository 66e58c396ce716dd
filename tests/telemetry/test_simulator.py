from __future__ import annotations

import itertools
import json
import random

import pytest

from wanrt.telemetry import Recorder, Span
from wanrt.telemetry.simulator import POLICIES, StageCosts, chunk_work, simulate

# The seed's scorecard: 172 ms full decode, 13 ms encode, the mesh at 885 ms eager and 805 ms compiled (PP1+TP=4).
EAGER = StageCosts(mesh=885, decode=172 / 3, encode=13)
COMPILED = StageCosts(mesh=805, decode=172 / 3, encode=13)


@pytest.mark.parametrize(
    ("run", "costs", "policy", "fps"),
    [
        (30, EAGER, "decode-all", 11.2),
        (31, EAGER, "overlap", 11.2),
        (34, COMPILED, "decode-all", 12.1),
        (37, COMPILED, "latent", 14.8),
        ("projected", COMPILED, "anchor-only", 13.7),
    ],
)
def test_the_seeds_table(run, costs, policy, fps):
    assert simulate(costs, policy).fps == pytest.approx(fps, rel=0.02)


def test_anchor_only_says_13_7():
    assert f"{simulate(COMPILED, 'anchor-only').fps:.1f}" == "13.7"
    assert simulate(COMPILED, "anchor-only").bubble == pytest.approx(172 / 3 + 13)


@pytest.mark.parametrize(
    ("window", "decodes", "encodes"), [(1, 3, 1), (2, 2, 1), (3, 1, 1), (4, 0, 0), (6, 0, 0)]
)
def test_what_each_window_leaves_on_the_path(window, decodes, encodes):
    costs = StageCosts(mesh=100, decode=10, encode=3, convert=2)
    work = chunk_work(costs, "anchor-only", window)
    assert work.path == decodes * 10 + encodes * 3
    assert work.path + work.display == 35


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pp1", [True, False])
def test_bounds_that_hold_whatever_the_costs(seed, pp1):
    rng = random.Random(seed)
    costs = StageCosts(*(rng.uniform(1, 100) for _ in range(5)))
    found = {policy: simulate(costs, policy, pp1=pp1) for policy in POLICIES}
    for policy, prediction in found.items():
        work = chunk_work(costs, policy)
        assert prediction.period >= costs.mesh - 1e-9
        assert prediction.period >= work.path + work.display - 1e-9
        if not pp1:
            assert prediction.period >= costs.mesh + work.path + work.display - 1e-9
    order = ("decode-all", "overlap", "anchor-only", "latent")
    periods = [found[policy].period for policy in order]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(periods))


def test_a_slow_stage_0_is_named():
    assert simulate(StageCosts(100, 60, 10), "anchor-only").bound.startswith("stage 0")
    assert simulate(StageCosts(100, 60, 10), "anchor-only").period == pytest.approx(190)
    assert simulate(StageCosts(300, 60, 10), "anchor-only").bound.startswith("the mesh and the path")
    assert simulate(StageCosts(300, 60, 10), "latent").bound == "the mesh"
    assert "one device" in simulate(StageCosts(300, 60, 10), "latent", pp1=False).bound


@pytest.mark.parametrize("beside", [True, False])
def test_display_work_beside_the_mesh_is_not_counted_twice(beside):
    """One device, 400 ms of passes, path 26, display 43: woven into the next chunk's passes, or before them."""
    chunks, start = {}, 0
    for chunk in range(6):
        end = start + 400 + (43 if beside and chunk else 0)
        submitted = end + 26
        first = submitted + (100 if beside else 20)
        second = submitted + (300 if beside else 40)
        spans = [
            ("mesh", "step", start, end),
            ("stage0", "anchor-decode", end, end + 20),
            ("stage0", "anchor-encode", end + 20, submitted),
            ("stage0", "display-decode", submitted, first),
            ("stage0", "display-decode", first, second),
            ("stage0", "convert", second, second + 3),
        ]
        chunks[chunk] = [Span(stage, name, chunk, a * 10**6, b * 10**6) for stage, name, a, b in spans]
        start = submitted if beside else second + 3
    del chunks[0]
    costs = StageCosts.of_chunks(chunks, shared=True, policy="anchor-only", window=3)
    assert costs == StageCosts(mesh=pytest.approx(400), decode=20, encode=6, convert=3)
    assert simulate(costs, "anchor-only", pp1=False).period == pytest.approx(469)


@pytest.mark.parametrize(("policy", "window"), [("anchor-only", 18), ("latent", 3)])
def test_a_whole_chunk_decoded_beside_the_mesh(policy, window):
    """Nothing lies on the path: 100 ms of passes, then 3 x 12 + 2 beside the next ones, where they take 30 each."""
    chunks, start = {}, 0
    for chunk in range(6):
        end = start + 100 + (38 if chunk else 0)
        each = 12 if chunk == 5 else 30
        spans = [("mesh", "step", start, end - 20), ("mesh", "commit", end - 20, end)]
        spans += [("stage0", "display-decode", end + i * each, end + (i + 1) * each) for i in range(3)]
        spans += [("stage0", "convert", end + 3 * each, end + 3 * each + 2)]
        chunks[chunk] = [Span(stage, name, chunk, a * 10**6, b * 10**6) for stage, name, a, b in spans]
        start = end
    del chunks[0]
    costs = StageCosts.of_chunks(chunks, shared=True, policy=policy, window=window)
    assert costs == StageCosts(mesh=pytest.approx(100), decode=12, encode=0, convert=2)
    assert simulate(costs, policy, pp1=False, window=window).period == pytest.approx(138)


def test_unknown_policy():
    with pytest.raises(ValueError, match="'all': expected one of decode-all"):
        simulate(EAGER, "all")


@pytest.mark.parametrize("policy", ["decode-all", "anchor-only"])
def test_costs_measured_by_a_run_predict_that_run(clock, tmp_path, policy):
    """A recording of a one-device run with jitter: the simulator must come within 10 % of its period."""
    rng = random.Random(4)
    recorder = Recorder(clock=clock)

    def work(stage, name, chunk, ms):
        with recorder.span(stage, name, chunk):
            clock.advance(ms * rng.uniform(0.95, 1.05))

    for chunk in range(20):
        if chunk:
            work("mesh", "context", chunk, 40)
        for _ in range(4):
            work("mesh", "step", chunk, 50)
        work("stage0", "anchor-decode", chunk, 20)
        work("stage0", "anchor-encode", chunk, 6)
        for _ in range(2):
            work("stage0", "display-decode", chunk, 20)
        work("stage0", "convert", chunk, 3)
        recorder.frames(chunk, 12)
    document = json.loads(recorder.write_stats(tmp_path / "s.json").read_text())
    costs = StageCosts.of_stats(document)
    assert costs.decode == pytest.approx(20, rel=0.05)
    predicted = simulate(costs, policy, pp1=False)
    assert predicted.period == pytest.approx(document["stats"]["period"]["mean_ms"], rel=0.1)
    with pytest.raises(ValueError, match="without a whole chunk"):
        StageCosts.of_stats({"stats": {"chunks": 0, "stages": []}})
