from __future__ import annotations

import itertools
import json
import random
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from wanrt.errors import OutputError
from wanrt.telemetry import Recorder
from wanrt.telemetry.quantiles import Reservoir, quantile
from wanrt.telemetry.spans import IntervalUnion, Span, attribute_gap


def play(recorder, clock, chunks, rng):
    """A serial run: context, 4 steps, anchor decode + encode, rest. Returns its naive facts in ms."""
    mesh_start, mesh_end, delivered, busy = [], [], [], 0.0
    for chunk in range(chunks):
        mesh_start.append(clock.now)
        with recorder.span("mesh", "chunk", chunk):
            for name in ("context", "step", "step", "step", "step"):
                with recorder.span("mesh", name, chunk):
                    clock.advance(took := rng.uniform(5, 50))
                    busy += took
        mesh_end.append(clock.now)
        clock.advance(0.5)
        for name, low, high in (("anchor-decode", 20, 40), ("anchor-encode", 5, 9)):
            with recorder.span("stage0", name, chunk):
                clock.advance(rng.uniform(low, high))
        clock.advance(0.25)
        recorder.frames(chunk, 9 if chunk == 0 else 12)
        delivered.append(clock.now)
    gaps = [(b - a) / 1e6 for a, b in zip(mesh_end, mesh_start[1:], strict=False)]
    periods = [(b - a) / 1e6 for a, b in itertools.pairwise(mesh_end)]
    return gaps, periods, delivered, busy, mesh_start[0]


@pytest.mark.parametrize("chunks", [2, 7, 60])
def test_bubbles_and_periods_equal_a_naive_computation(clock, chunks):
    recorder = Recorder(clock=clock, fps=16)
    gaps, periods, delivered, busy, first = play(recorder, clock, chunks, random.Random(chunks))
    stats = recorder.stats()
    mesh = stats.stage("mesh")
    assert mesh.bubble.count == len(gaps)
    for spread, naive in ((mesh.bubble, gaps), (mesh.period, periods)):
        assert spread.mean_ms == pytest.approx(np.mean(naive), abs=1e-5)
        assert spread.p50_ms == pytest.approx(np.quantile(naive, 0.5), abs=1e-5)
        assert spread.p95_ms == pytest.approx(np.quantile(naive, 0.95), abs=1e-5)
        assert spread.max_ms == pytest.approx(max(naive), abs=1e-5)
    wall = (delivered[-1] - 250_000 - first) / 1e6
    assert mesh.busy_share == pytest.approx(busy / wall, rel=1e-6)
    assert mesh.spans["step"].count == 4 * chunks
    assert sum(mesh.waited_for.values()) == pytest.approx(np.mean(gaps), abs=1e-5)
    assert mesh.waited_for["unrecorded"] == pytest.approx(0.75)
    assert next(iter(mesh.waited_for)) == "stage0/anchor-decode"
    assert stats.fps_mean == pytest.approx(12 * (chunks - 1) * 1e9 / (delivered[-1] - delivered[0]))
    assert stats.time_to_first_frame_s == pytest.approx((delivered[0] - 1_000_000_000) / 1e9)
    assert stats.chunks == chunks
    assert stats.frames == 12 * chunks - 3


def test_frames_late_against_a_player_that_starts_at_the_first_frame(clock):
    rng = random.Random(3)
    recorder = Recorder(clock=clock, fps=Fraction(30000, 1001))
    late, index, first = 0, 0, None
    for chunk in range(40):
        clock.advance(rng.uniform(300, 500))
        first = clock.now if first is None else first
        for _ in range(12):
            late += clock.now - first > index * 1_001_000_000_000 / 30000 + 1
            index += 1
        recorder.frames(chunk, 12)
    assert 0 < late < index
    assert recorder.stats().frames_late == late


def test_prompt_to_pixel_runs_to_the_first_chunk_made_with_it(clock):
    recorder = Recorder(clock=clock)
    recorder.prompt(2, "a red ball")
    clock.advance(100)
    recorder.frames(1, 12)
    clock.advance(40)
    recorder.frames(2, 12)
    latency = recorder.stats().prompt_to_pixel
    assert latency.count == 1
    assert latency.p50_ms == pytest.approx(140)


class FakeDevice:
    """A device that reaches its stamps `lag` resolve calls late."""

    def __init__(self, clock, lag):
        self.clock, self.lag, self.asked = clock, lag, {}

    def record(self):
        return [self.clock.now]

    def resolve(self, start, end):
        self.asked[id(end)] = self.asked.get(id(end), 0) + 1
        return (start[0] + 7, end[0] + 7) if self.asked[id(end)] > self.lag else None


def test_device_spans_are_resolved_later_and_never_waited_for(clock):
    recorder = Recorder(clock=clock, device_clock=FakeDevice(clock, 2))
    with recorder.span("mesh", "step", 0):
        clock.advance(10)
    with recorder.span("encoder", "encode", 0, host=True):
        clock.advance(1)
    assert [s.stage for s in recorder.stats().stages] == ["encoder"]
    recorder.poll()
    stats = recorder.stats()
    assert stats.stage("mesh").spans["step"].p50_ms == pytest.approx(10)
    assert stats.spans_recorded == 2


def test_open_spans_show_in_recent(clock):
    recorder = Recorder(clock=clock)
    with recorder.span("mesh", "old", 0):
        clock.advance(10)
    clock.advance(5000)
    with recorder.span("mesh", "chunk", 1):
        clock.advance(100)
        recent = recorder.recent(2.0)
    assert [(s.name, s.duration_ns) for s in recent] == [("chunk", 100_000_000)]


def test_batches_of_another_process_join_the_books(clock):
    rank, books = Recorder(clock=clock, rank="mesh0"), Recorder(clock=clock)
    with rank.span("mesh", "step", 0):
        clock.advance(10)
    books.absorb(rank.drain(), offset_ns=5)
    with rank.span("mesh", "step", 1):
        clock.advance(20)
    rank.mark("mesh", "nan", 1)
    books.absorb(rank.drain(), offset_ns=5)
    assert rank.drain() == []
    stage = books.stats().stage("mesh", "mesh0")
    assert stage.spans["step"].count == 2
    assert stage.busy_s == pytest.approx(0.03)


def test_memory_is_bounded_for_endless_streams(clock):
    recorder = Recorder(clock=clock, ring=100)
    for chunk in range(3000):
        with recorder.span("mesh", "step", chunk):
            clock.advance(1)
        clock.advance(1)
    stats = recorder.stats()
    assert len(recorder._spans) == 100
    assert stats.spans_recorded == 3000
    assert stats.stage("mesh").busy_share == pytest.approx(0.5, abs=1e-3)
    assert stats.stage("mesh").bubble.count == 2999
    assert len(stats.stage("mesh").spans) == 1


def test_spans_of_many_threads(clock):
    recorder = Recorder()

    def work(stage):
        for chunk in range(500):
            with recorder.span(stage, "outer", chunk), recorder.span(stage, "inner", chunk):
                pass

    threads = [threading.Thread(target=work, args=(f"s{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = recorder.stats()
    assert stats.spans_recorded == 4000
    assert all(s.spans["inner"].count == 500 for s in stats.stages)
    assert {(s.name, s.depth) for s in recorder._spans} == {("outer", 0), ("inner", 1)}


def test_a_failing_block_is_recorded_and_its_error_passes(clock):
    recorder = Recorder(clock=clock)
    with pytest.raises(KeyError), recorder.span("mesh", "step", 0):
        raise KeyError("x")
    assert recorder.stats().spans_recorded == 1


def test_a_span_costs_less_than_20_us():
    recorder = Recorder()
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        for i in range(2000):
            with recorder.span("mesh", "step", i // 5, step=i):
                pass
        best = min(best, (time.thread_time() - start) / 2000)
    print(f"{best * 1e6:.1f} us a span")
    assert best < 20e-6


def test_interval_union_against_a_bitmap():
    rng = random.Random(1)
    union, bitmap = IntervalUnion(), np.zeros(3000, bool)
    for i in range(120):
        start = i * 20 + rng.randrange(60)
        end = start + rng.randrange(40)
        union.add(start, end)
        bitmap[start:end] = True
        assert union.total == bitmap.sum()


def test_attribution_names_the_innermost_span():
    spans = [
        Span("stage0", "anchor", 0, 10, 60, depth=0),
        Span("stage0", "decode", 0, 10, 40, depth=1),
        Span("text", "encode", 0, 50, 90),
        Span("stage0", "old", 0, 0, 5),
    ]
    assert attribute_gap(5, 100, spans) == {
        "unrecorded": 15,
        "stage0/decode": 30,
        "stage0/anchor": 20,
        "text/encode": 40,
    }


def test_quantiles_are_numpys_and_the_reservoir_is_fair():
    rng = random.Random(5)
    values = [rng.random() for _ in range(501)]
    for q in (0, 0.05, 0.5, 0.95, 1):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q))
    reservoir = Reservoir(capacity=1000)
    for i in range(50_000):
        reservoir.add(i)
    assert (reservoir.count, reservoir.max) == (50_000, 49_999)
    assert quantile(reservoir.sample, 0.5) == pytest.approx(25_000, rel=0.1)
    with pytest.raises(ValueError, match="empty"):
        quantile([], 0.5)


def test_stats_file(clock, tmp_path):
    recorder = Recorder(clock=clock, fps=16)
    play(recorder, clock, 3, random.Random(0))
    path = recorder.write_stats(tmp_path / "stats.json", {"seed": 7, "fps": Fraction(16), "size": (224, 128)})
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["settings"] == {"seed": 7, "fps": "16", "size": [224, 128]}
    assert document["stats"]["frames"] == 33
    assert {s["stage"] for s in document["stats"]["stages"]} == {"mesh", "stage0"}
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


def test_an_empty_recording_still_makes_a_valid_file(clock, tmp_path):
    document = json.loads(Recorder(clock=clock).write_stats(tmp_path / "s.json").read_text())
    assert document["stats"]["fps_mean"] is None


def test_unwritable_places_are_named(clock, tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*missing.*writable directory"):
        Recorder(clock=clock).write_stats(tmp_path / "missing" / "stats.json")
