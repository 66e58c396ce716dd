"""Long matrices: what is in them, in which order, within which time; processes stood in for by a script."""

import contextlib
import json
import re
import sys
from fractions import Fraction

import psutil
import pytest

from wanrt.errors import UsageError
from wanrt.pipeline import campaign
from wanrt.pipeline.bench_report import report
from wanrt.pipeline.build import Tuning
from wanrt.pipeline.campaign import Campaign, run_campaign
from wanrt.pipeline.matrix import MATRICES, Entry, entries_of, needs_own_process
from wanrt.script import RenderJob, Timeline, load_preset
from wanrt.telemetry import Span

FLAGS = {"size": "64x64", "precision": "fp32", "random_weights": True, "device": "cpu"}

# Takes the place of `python -m wanrt bench --json PART --matrix ENTRIES`: "measures" without loading anything.
SCRIPT = """
import json, os, pathlib, sys, time
template, log, hang, part, _, entries = sys.argv[1:7]
runs = []
if hang == "slow":
    time.sleep(1)  # as an import of torch would
for entry in entries.split(","):
    with open(log, "a") as file:
        file.write(f"{entry} {os.environ.get('NCCL_P2P_DISABLE', '0')}\\n")
    if "say" in hang:
        print(f"[0:01] {entry}", "a line of no progress", "[0:02] loading transformer (beside VAE)", sep="\\n",
              file=sys.stderr, flush=True)
    if entry == hang.removeprefix("say "):
        time.sleep(600)
    if "fail" in hang and entry.startswith(hang.removeprefix("fail ").removeprefix("say ")):
        sys.exit("wanrt: the device is on fire")
    runs.append({**json.loads(pathlib.Path(template).read_text()), "entry": entry, "name": entry})
    pathlib.Path(part + ".new").write_text(json.dumps({"runs": runs}))
    os.rename(part + ".new", part)
"""
MS = 1_000_000


@pytest.fixture
def document():
    """A measured run of 100 ms passes, 20 ms path, 10 ms of display, one after the other."""
    preset = load_preset("wan-tiny")
    job = RenderJob(
        preset=preset, timeline=Timeline.of("a ball"), seed=3, width=64, height=64, fps=Fraction(16), frames=None,
        steps=preset.steps, window=3, bias=1.0, anchor="anchor-only", random_weights=True, device="cpu",
        topology="single",
    )  # fmt: skip
    spans = {}
    for chunk in range(3, 6):
        at = 130 * chunk
        parts = [
            ("mesh", "step", 0, 100),
            ("stage0", "anchor-decode", 100, 5),
            ("stage0", "anchor-encode", 105, 15),
        ]
        parts += [("stage0", "display-decode", 120, 5), ("stage0", "display-decode", 125, 5)]
        spans[chunk] = [Span(s, n, chunk, (at + a) * MS, (at + a + d) * MS) for s, n, a, d in parts]
    return report(job, spans, 3, (1.0, 2.0), None, Tuning()).document()


@pytest.fixture
def run(document, tmp_path, monkeypatch):
    """`run(name, hang=..., budget=..., resume=...)`: the table, the JSON, and what was started."""
    (tmp_path / "fake.py").write_text(SCRIPT)
    (tmp_path / "template.json").write_text(json.dumps(document))
    log, out = tmp_path / "log", tmp_path / "out.json"

    def go(matrix, hang="", budget=None, resume=False, flags=FLAGS, say=lambda line: None):
        def command(self, entries, part):
            texts = ",".join(entry.text for entry in entries)
            return [
                sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "template.json"), str(log), hang, str(part),
                "--matrix", texts,
            ]  # fmt: skip

        monkeypatch.setattr(campaign._Campaign, "_command", command)
        log.write_text("")
        entries = entries_of(None, matrix, flags.get("size"), flags.get("precision"))
        how = Campaign(flags, 3, 3, Tuning(), str(out), budget, resume, say)
        table = run_campaign(how, entries)
        return table, json.loads(out.read_text()), log.read_text().splitlines()

    yield go
    assert not [p for p in psutil.Process().children() if "fake.py" in " ".join(p.cmdline())]


def test_what_the_named_matrices_hold():
    four = MATRICES["four"]
    assert [entry.topology for entry in four[:4]] == ["single"] * 4
    for topology in ("pp1+tp=2", "pp1+ulysses=2", "pp1+tp=2+vae=2", "tp=4", "ulysses=4", "ulysses=4+vae=4"):
        for size in ("576x320", "832x480"):
            for precision in ("bf16", "fp8"):
                for p2p in (True, False):
                    assert Entry(topology, size=size, precision=precision, p2p=p2p) in four
    assert {e.anchor for e in four if e.topology == "pp1+tp=2" and e.p2p} == {
        None, "decode-all", "overlap", "latent", "first-frame",
    }  # fmt: skip
    assert len(MATRICES["eight"]) == 4 + 7 * 2 * 2 * 2
    assert len(MATRICES["two"]) == 2 + 5 * 2 * 2 + 3 * 2
    for matrix in MATRICES.values():
        assert all(Entry.parse(entry.text).flags == {"topology": "single", **entry.flags} for entry in matrix)


@pytest.mark.parametrize("matrix", ["two", "four", "eight"])
def test_a_rehearsal(run, matrix):
    """Every entry is measured or listed with its reason; those of one topology share a process."""
    table, found, started = run(matrix)
    assert [r["entry"] for r in found["runs"]] == found["order"]
    assert found["waiting"] == []
    reasons = {r["entry"]: r["reason"] for r in found["runs"] if "reason" in r}
    assert [line.split()[0] for line in started] == [e for e in found["order"] if e not in reasons]
    assert all(
        "changes nothing on a CPU" in reasons[e]
        for e in found["order"]
        if e.endswith("no-p2p") and "5" not in e
    )
    if matrix == "eight":
        assert "8 % 5 = 3 (heads)" in reasons["pp1+ulysses=5"]
        assert "not measured: pp1+ulysses=5: --topology pp1+ulysses=5: 8 % 5" in table
    measured = next(r for r in found["runs"] if r["entry"] == "single")
    assert measured["predictions"]["own"]["error"] == pytest.approx(0, abs=0.01)
    assert "predicted: single: 130.0 ms measured; 130.0 (+0.0%) from its own stage costs" in table


def test_fp8_on_a_cpu_is_listed(run):
    _, found, _ = run("four", flags={**FLAGS, "precision": None})
    reasons = {r["entry"]: r.get("reason") for r in found["runs"]}
    assert "precision" in reasons["single:fp8"]


def test_time_is_bounded_and_a_second_call_goes_on(run):
    _, found, _ = run("two", hang="tp=2", budget=4.0)  # sleeps for longer than a test may take
    reasons = {r["entry"]: r.get("reason", "") for r in found["runs"]}
    assert reasons["tp=2"] == "the budget of 4 s was used up before it was done"
    assert reasons["pp1+tp=1"] == "the budget of 4 s was used up before"
    assert reasons["ulysses=2"] == ""
    _, found, again = run("two", resume=True)
    assert [line.split()[0] for line in again] == ["tp=2", "ulysses=2+vae=2", "tp=2+vae=2", "pp1+tp=1"]
    assert [r["entry"] for r in found["runs"] if "costs" in r][:2] == ["single", "ulysses=2"]


def test_what_a_process_was_doing_when_time_was_up_is_named_and_kept(run, tmp_path, caplog):
    caplog.set_level("DEBUG", "wanrt")
    said = []
    flags = {**FLAGS, "size": None}
    matrix = "single,tp=2:32x32,tp=2:64x64,tp=2:96x96"
    _, found, _ = run(matrix, hang="say tp=2:64x64", budget=4.0, flags=flags, say=said.append)
    reasons = {r["entry"]: r.get("reason", "") for r in found["runs"]}
    assert re.fullmatch(
        r"the budget of 4 s was used up while: loading transformer \(beside VAE\) \([0-4] s\)",
        reasons["tp=2:64x64"],
    )
    assert reasons["tp=2:96x96"] == "the budget of 4 s was used up before"
    assert reasons["tp=2:32x32"] == ""
    loading = "[0:02] loading transformer (beside VAE)"
    assert said == [x for e in ("single", "tp=2:32x32", "tp=2:64x64") for x in (f"[0:01] {e}", loading)]
    kept = (tmp_path / "out.json.log").read_text()
    assert kept.splitlines()[:5] == [
        "# single", "[0:01] single", "a line of no progress", loading, "# tp=2:32x32,tp=2:64x64,tp=2:96x96",
    ]  # fmt: skip
    assert kept.count("a line of no progress") == 3
    debug = next(r.getMessage() for r in caplog.records if r.levelname == "DEBUG" and "its last" in r.message)
    assert debug.endswith(f"[0:01] tp=2:64x64 | a line of no progress | {loading}")


def test_the_first_process_is_started_before_torch_is_imported_here(run, monkeypatch):
    """What this machine cannot run is found out while it starts, and listed all the same."""
    began, possible = [], campaign._Campaign._possible

    def noted(self, entry):
        began.append(
            (entry.text, [p for p in psutil.Process().children() if "fake.py" in " ".join(p.cmdline())])
        )
        return possible(self, entry)

    monkeypatch.setattr(campaign._Campaign, "_possible", noted)
    monkeypatch.setattr(campaign, "has_torch", lambda: bool(began))  # `_possible` imports it
    monkeypatch.setattr("wanrt.pipeline.build.settle_topology", settled)
    _, found, started = run("single:fp8,single,tp=3,tp=2:fp8,tp=2", hang="slow")
    reasons = {r["entry"]: r.get("reason", "") for r in found["runs"]}
    assert "8 % 3" in reasons["tp=3"]
    assert reasons["single:fp8"] == reasons["tp=2:fp8"] == "no fp8 here"
    assert reasons["single"] == reasons["tp=2"] == ""
    assert [(text, bool(processes)) for text, processes in began] == [
        ("single:fp8", True), ("single", True), ("tp=2:fp8", False), ("tp=2", False),
    ]  # fmt: skip
    assert [line.split()[0] for line in started] == ["single:fp8", "single", "tp=2"]


def settled(job, device):
    if job.precision == "fp8":
        raise UsageError("no fp8 here")


def test_the_log_is_begun_anew_and_gone_on_with(run, tmp_path):
    log = tmp_path / "out.json.log"
    run("single", hang="say nothing")
    run("single", hang="say nothing")
    assert log.read_text().count("# single") == 1
    run("single,tp=2", hang="say nothing", resume=True)
    assert [line for line in log.read_text().splitlines() if line[0] == "#"] == ["# single", "# tp=2"]


def test_a_process_that_fails_says_what_it_was_doing(run):
    _, found, _ = run("single", hang="fail say single")
    assert re.fullmatch(
        r"its process ended with code 1 while: loading transformer \(beside VAE\) \(\d s\): "
        "wanrt: the device is on fire",
        found["runs"][0]["reason"],
    )


def test_a_process_that_fails_costs_its_own_entries(run):
    _, found, started = run("two", hang="fail tp=2+vae")
    reasons = {r["entry"]: r.get("reason", "") for r in found["runs"]}
    assert reasons["tp=2+vae=2"] == "its process ended with code 1: wanrt: the device is on fire"
    assert "pp1+tp=1 0" in started


def test_without_peer_to_peer_means_a_process_that_nccl_is_told_in(run, monkeypatch):
    monkeypatch.setattr(campaign._Campaign, "_possible", lambda self, entry: True)
    _, _, started = run("single,tp=2,tp=2:no-p2p")
    assert started == ["single 0", "tp=2 0", "tp=2:no-p2p 1"]


def test_results_to_go_on_from(tmp_path):
    how = Campaign(FLAGS, 2, 1, Tuning(), None, resume=True)
    with pytest.raises(UsageError, match="--resume: expected --json FILE"):
        run_campaign(how, [Entry("single")])
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UsageError, match="no file of wanrt bench --json"):
        run_campaign(
            Campaign(FLAGS, 2, 1, Tuning(), str(tmp_path / "x.json"), resume=True), [Entry("single")]
        )


@pytest.mark.slow
def test_a_real_matrix_of_two(tmp_path):
    out = tmp_path / "x.json"
    entries = entries_of(None, "two", "32x32", "fp32")
    table = run_campaign(Campaign(FLAGS | {"size": "32x32"}, 2, 1, Tuning(), str(out)), entries)
    runs = json.loads(out.read_text())["runs"]
    assert [r["entry"] for r in runs if "costs" in r] == [e.text for e in entries if e.p2p]
    assert "VAE split: ulysses=2+vae=2 anchor-only" in table


def test_the_process_that_was_told_measures_and_starts_no_other(monkeypatch):
    """Else each would start the next, for ever."""
    entry = Entry("tp=2", p2p=False)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert needs_own_process(entry)
    assert not needs_own_process(Entry("tp=2"))
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert not needs_own_process(entry)


def test_a_process_of_the_campaign_is_no_campaign(monkeypatch, capsys):
    from wanrt.cli.app import run as wanrt_run
    from wanrt.pipeline import bench, campaign

    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setattr(campaign, "run_campaign", lambda *_: pytest.fail("another campaign"))
    monkeypatch.setattr(bench, "run_bench", lambda flags, entries, *_: f"measured {entries[0].text}")
    with contextlib.suppress(SystemExit):
        wanrt_run(["bench", "--preset", "wan-tiny", "--matrix", "tp=2:no-p2p"])
    assert "measured tp=2:no-p2p" in capsys.readouterr().out
