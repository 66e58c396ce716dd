from __future__ import annotations

import json
from collections import defaultdict

import pytest

from wanrt.telemetry import Recorder, Span


def record(clock, tmp_path, chunks=5):
    recorder = Recorder(clock=clock, rank="main")
    for chunk in range(chunks):
        with recorder.span("mesh", "chunk", chunk):
            for step in range(4):
                with recorder.span("mesh", "step", chunk, step=step):
                    clock.advance(10.123457)
        clock.advance(0.2)
        with recorder.span("stage0", "anchor", chunk):
            with recorder.span("stage0", "decode", chunk):
                clock.advance(3)
            with recorder.span("stage0", "encode", chunk):
                clock.advance(1)
        recorder.frames(chunk, 12)
    return json.loads(recorder.write_trace(tmp_path / "trace.json", {"seed": 1}).read_text())


def by_thread(events):
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(
                (event["ts"], event["ts"] + event["dur"], event["name"])
            )
    return threads


def assert_nested(spans):
    """Any two spans of one thread are disjoint or one holds the other (1 ns of rounding allowed)."""
    for i, (a, b, _) in enumerate(spans):
        for c, d, _ in spans[i + 1 :]:
            disjoint = b <= c + 1e-3 or d <= a + 1e-3
            holds = (a <= c + 1e-3 and d <= b + 1e-3) or (c <= a + 1e-3 and b <= d + 1e-3)
            assert disjoint or holds


def test_schema_and_nesting(clock, tmp_path):
    document = record(clock, tmp_path)
    events = document["traceEvents"]
    for event in events:
        assert {"ph", "name", "pid", "tid", "ts"} <= event.keys()
        assert event["ph"] in {"M", "X", "i", "s", "f"}
        assert event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    names = {(e["name"], e["args"]["name"]) for e in events if e["name"] in ("process_name", "thread_name")}
    assert {("process_name", "wanrt main"), ("thread_name", "mesh"), ("thread_name", "stage0")} <= names
    threads = by_thread(events)
    assert sum(map(len, threads.values())) == 5 * 8
    for spans in threads.values():
        assert_nested(spans)
    step = next(e for e in events if e["name"] == "step")
    assert step["args"] == {"chunk": 0, "step": 0}
    assert document["otherData"]["settings"] == {"seed": 1}


def test_arrows_lead_from_latents_to_anchor_to_the_next_chunk(clock, tmp_path):
    events = record(clock, tmp_path)["traceEvents"]
    spans = by_thread(events)
    starts = [e for e in events if e["ph"] == "s"]
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert sorted(e["name"] for e in starts) == ["anchor"] * 4 + ["latents"] * 5
    for tail in starts:
        head = ends[tail["id"]]
        assert tail["ts"] <= head["ts"]
        for end in (tail, head):
            around = [s for s in spans[end["pid"], end["tid"]] if s[0] <= end["ts"] <= s[1]]
            assert around, "a flow event must lie inside a span of its thread"


def test_overlapping_spans_of_a_stage_get_a_second_thread(clock, tmp_path):
    recorder = Recorder(clock=clock)
    recorder.absorb(
        [Span("stage0", "a", 0, 0, 100), Span("stage0", "b", 0, 50, 150), Span("stage0", "c", 0, 100, 120)]
    )
    events = json.loads(recorder.write_trace(tmp_path / "t.json").read_text())["traceEvents"]
    for spans in by_thread(events).values():
        assert_nested(spans)
    assert "stage0 (2)" in {e["args"].get("name") for e in events if e["ph"] == "M"}


@pytest.mark.parametrize("ring", [4])
def test_spans_that_left_the_ring_are_counted(clock, tmp_path, ring):
    recorder = Recorder(clock=clock, ring=ring)
    for chunk in range(10):
        with recorder.span("mesh", "step", chunk):
            clock.advance(1)
    document = json.loads(recorder.write_trace(tmp_path / "t.json").read_text())
    assert document["otherData"]["spans_dropped"] == 6
