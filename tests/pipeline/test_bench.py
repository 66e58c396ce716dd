import dataclasses
import json
import re
from fractions import Fraction

import pytest

from wanrt.errors import RunError, UsageError
from wanrt.pipeline.bench import bench, run_bench
from wanrt.pipeline.bench_report import BenchReport, by_chunk, report, table
from wanrt.pipeline.build import Tuning
from wanrt.pipeline.matrix import SEED_MATRIX, Entry, entries_of
from wanrt.pipeline.startup import Startup
from wanrt.script import RenderJob, Timeline, load_preset
from wanrt.telemetry import Span
from wanrt.telemetry.simulator import simulate

MS = 1_000_000


@pytest.fixture
def job():
    preset = load_preset("wan-tiny")
    return RenderJob(
        preset=preset, timeline=Timeline.of("a red ball"), seed=3, width=64, height=48, fps=Fraction(16), frames=None,
        steps=preset.steps, window=3, bias=1.0, anchor="anchor-only", random_weights=True, device="cpu",
    )  # fmt: skip


def seed_chunk(chunk, start):
    """A chunk of the seed system: mesh 885 ms, then 57 + 13 ms on the path, 115 ms beside it."""
    at = start * MS
    mesh = [("context", 0, 177), *((f"step{i}", 177 * (i + 1), 177) for i in range(4))]
    stage0 = [("anchor-decode", 885, 57), ("anchor-encode", 942, 13), ("display-decode", 955, 115)]
    work = [("mesh", *m) for m in mesh] + [("stage0", *s) for s in stage0]
    return [Span(stage, name, chunk, at + a * MS, at + (a + d) * MS) for stage, name, a, d in work]


def test_columns_of_a_known_recording(job):
    spans = {chunk: seed_chunk(chunk, 955 * chunk) for chunk in range(3, 9)}
    got = report(job, spans, 3, (1.0, 2.0), None, Tuning())
    assert got.chunks == 6
    assert got.period.p50_ms == pytest.approx(955)
    assert got.mesh.p50_ms == pytest.approx(885)
    assert got.stage0.p50_ms == pytest.approx(57 + 13 + 115)
    assert got.anchor_path.p50_ms == pytest.approx(70)
    assert got.fps == pytest.approx(12 / 0.955)
    assert got.fps_without_vae == pytest.approx(12 / 0.885)
    assert "12.57" in table([got])
    # display work ran beside the passes, on the same device: what is predicted from the costs is what was measured
    assert (got.costs.mesh, got.costs.decode, got.costs.encode) == pytest.approx((885 - 2 * 57, 57, 13))
    assert simulate(got.costs, "anchor-only", pp1=False).period == pytest.approx(955)
    json.dumps(got.document())


def test_the_ranks_of_a_mesh_count_once(job):
    def two_ranks(chunk, start):
        spans = seed_chunk(chunk, start)
        return [*spans, *(dataclasses.replace(s, rank="mesh1") for s in spans if s.stage == "mesh")]

    spans = {chunk: two_ranks(chunk, 955 * chunk) for chunk in range(3, 9)}
    got = report(dataclasses.replace(job, topology="pp1+tp=2"), spans, 3, (1.0, 2.0), None, Tuning())
    assert got.mesh.p50_ms == pytest.approx(885)
    assert got.costs.mesh == pytest.approx(885)


def test_an_incomplete_recording_is_refused(job):
    spans = {3: seed_chunk(3, 0), 4: []}
    with pytest.raises(RunError, match="lacks passes"):
        report(job, spans, 3, (1.0, 2.0), None, Tuning())


def test_a_run(job):
    got = bench(job, chunks=2, warm_up=1)
    assert got.chunks == 2
    assert got.mesh.p50_ms > 0
    assert got.period.p50_ms > got.anchor_path.p50_ms > 0  # of the one pair of chunks: a part and the whole
    assert got.memory_bytes is None
    assert got.prompt_tokens == 32  # as many as wan-tiny takes


@pytest.mark.parametrize(("chunks", "warm_up"), [(1, 3), (8, 0)])
def test_too_few_chunks_are_refused(job, chunks, warm_up):
    with pytest.raises(UsageError, match="at least 2"):
        bench(job, chunks=chunks, warm_up=warm_up)


def test_the_command(tmp_path):
    flags = {"size": "32x32", "random_weights": True, "device": "cpu"}
    out = tmp_path / "b.json"
    printed = run_bench(flags, entries_of("decode-all,latent", None), 2, 1, Tuning(), str(out))
    assert "single decode-all" in printed
    runs = json.loads(out.read_text())["runs"]
    assert [run["name"] for run in runs] == ["single decode-all", "single latent"]
    assert runs[0]["fps"] > 0
    assert runs[0]["settings"]["random_weights"] is True


def test_it_says_what_it_is_doing_and_keeps_the_seconds(tmp_path):
    flags = {"size": "32x32", "random_weights": True, "device": "cpu"}
    said, out = [], tmp_path / "b.json"
    run_bench(flags, entries_of(None, "single,tp=2"), 2, 1, Tuning(), str(out), say=said.append)
    assert all(re.match(r"\[\d+:\d\d\] ", line) for line in said)
    words = [line.partition("] ")[2] for line in said]
    tp = words.index("tp=2 (2 of 2)")
    assert words[0] == "single (1 of 2)"
    assert words.index("loading VAE") < words.index("loading transformer") < tp
    assert words[tp - 1].startswith("single anchor-only: ")
    assert "making 1 chunks to warm up, then 2 to measure" in words[tp:]
    single, split = (run["startup"] for run in json.loads(out.read_text())["runs"])
    parts = {"PyTorch", "devices", "VAE", "transformer", "first chunk"}
    assert parts == set(single)
    assert set(split) >= {
        *parts, "rank processes", "communicator", "other ranks", "mesh1: PyTorch", "mesh1: communicator",
        "mesh1: transformer",
    }  # fmt: skip
    assert all(seconds >= 0 for seconds in (*single.values(), *split.values()))


def test_the_ranks_of_the_next_entry_are_started_while_this_one_loads(monkeypatch):
    """And have imported what they need before anything is made: what is measured has the machine to itself."""
    from wanrt.parallel import reserve

    flags = {"size": "32x32", "random_weights": True, "device": "cpu"}
    events, start, wait = [], reserve._start, reserve.Reserve.wait
    monkeypatch.setattr(reserve, "_start", lambda *args: events.append("start") or start(*args))
    monkeypatch.setattr(reserve.Reserve, "wait", lambda self: wait(self) or events.append("wait"))
    say = lambda line: events.append(line.partition("] ")[2].partition(" ")[0])  # noqa: E731 (its first word)
    run_bench(flags, entries_of(None, "tp=2,single,tp=2:latent"), 2, 1, Tuning(), None, say=say)
    events = [event for event in events if event in ("start", "wait", "making", "single")]
    assert events == [
        "start", "wait", "making",  # tp=2; single has no ranks
        "start", "single", "wait", "making", "single",  # those of the last entry
        "wait", "making",
    ]  # fmt: skip


def test_a_part_that_begins_beside_others_says_so():
    said = []
    startup = Startup(said.append)
    for part, seconds in [("VAE", None), ("mesh1: transformer", None), ("VAE", 1.5), ("warm-up", None)]:
        startup.heard(part, seconds)
    startup.heard("warm-up", None)  # the next graph of the same warm-up
    assert [line.partition("] ")[2] for line in said] == [
        "loading VAE",
        "loading mesh1: transformer (beside VAE)",
        "loading warm-up (beside mesh1: transformer)",
    ]
    assert startup.seconds == {"VAE": 1.5}


def test_a_part_that_takes_long_is_said_again(monkeypatch):
    said = []
    startup = Startup(said.append)
    startup.heard("VAE", None)
    startup.heard("transformer", None)
    startup.heard("transformer", None, 0.2)
    monkeypatch.setattr("wanrt.pipeline.startup.SAY_EVERY_S", 0.0)  # so much time went by
    startup.heard("transformer", None, 0.21)
    assert [line.partition("] ")[2] for line in said] == [
        "loading VAE",
        "loading transformer (beside VAE)",
        "loading transformer 21 % (beside VAE)",
    ]


def test_a_report_of_an_older_file_has_no_startup(job):
    spans = {chunk: seed_chunk(chunk, 955 * chunk) for chunk in range(3, 9)}
    got = report(job, spans, 3, (1.0, 2.0), None, Tuning(), {"VAE": 1.5})
    document = got.document()
    assert document["startup"] == {"VAE": 1.5}
    assert BenchReport.read(document).startup == {"VAE": 1.5}
    del document["startup"]
    assert BenchReport.read(document).startup == {}


def test_a_report_says_how_long_its_prompt_was(job):
    spans = {chunk: seed_chunk(chunk, 955 * chunk) for chunk in range(3, 9)}
    known, other = (report(job, spans, 3, (1.0, 2.0), None, Tuning(), None, tokens) for tokens in (128, None))
    document = known.document()
    assert document["prompt_tokens"] == 128
    assert BenchReport.read(document).prompt_tokens == 128
    assert "ms; prompt of 128 tokens; not included: text encoding" in table([known, other])
    assert "ms; not included: text encoding" in table([other])
    del document["prompt_tokens"]  # a file of an older version
    assert BenchReport.read(document).prompt_tokens is None


def test_spans_of_other_chunks_are_left_out():
    class Recorder:
        def recent(self, seconds):
            return seed_chunk(0, 0) + seed_chunk(1, 955)

    assert {s.chunk for s in by_chunk(Recorder(), range(1, 2))[1]} == {1}


def test_a_matrix_marks_what_cannot_be_run(tmp_path):
    flags = {"size": "32x32", "random_weights": True, "device": "cpu"}
    out = tmp_path / "b.json"
    entries = entries_of(None, "single:latent,tp=3:anchor-only")
    printed = run_bench(flags, entries, 2, 1, Tuning(), str(out))
    assert "single latent" in printed
    assert "not measured: tp=3 anchor-only: --topology tp=3: 8 % 3 = 2" in printed
    assert "reason" in json.loads(out.read_text())["runs"][1]
    with pytest.raises(UsageError, match="8 % 3"):
        run_bench(flags, entries[1:], 2, 1, Tuning(), None)


def test_entries():
    assert entries_of(None, "tp=2:latent:compile, single") == (Entry("tp=2", "latent", True), Entry("single"))
    assert entries_of("all", None)[0] == Entry(anchor="decode-all")
    assert entries_of(None, None) == (Entry(),)
    assert [entry.name[:2] for entry in entries_of(None, "seed")] == [str(run) for run in range(30, 38)]
    assert SEED_MATRIX[5].topology == "pp1+tp=5"
    assert "tp=2+vae=2" in [entry.topology for entry in entries_of(None, "vae")]
    for bad in ("", "tp=2:latent:more", "tp=2::compile"):
        with pytest.raises(UsageError, match="matrix entry"):
            entries_of(None, bad)
