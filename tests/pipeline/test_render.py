"""`render` around a pipeline that misbehaves: whatever happens, a finished file and one line."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from wanrt.errors import OutputError, RunError, UsageError
from wanrt.output import QueuedSink
from wanrt.panel import Phase
from wanrt.pipeline import assemble, render
from wanrt.pipeline.cancel import Cancel, CancelledError
from wanrt.pipeline.loop import Frames
from wanrt.pipeline.monitor import Monitor
from wanrt.pipeline.run import metadata, one_line_errors, scene_text
from wanrt.script import RenderJob, Scene, Timeline, load_preset
from wanrt.telemetry import Recorder

SIZE = (48, 64, 3)


class Watcher:
    """An observer that remembers."""

    def __init__(self):
        self.snapshots, self.summary, self.closed = [], None, 0

    def update(self, snapshot):
        self.snapshots.append(snapshot)

    def log(self, line, level=0):
        pass

    def close(self, summary=None):
        self.summary, self.closed = summary, self.closed + 1


class FakePipeline:
    """Gives out grey chunks, then does what it is told."""

    def __init__(self, chunks, end=lambda: None):
        self.chunks, self.end, self.closed = chunks, end, False

    def run(self):
        first = 0
        for chunk in range(self.chunks):
            count = 12 if chunk else 9
            yield Frames(torch.full((count, *SIZE), 10 * chunk, dtype=torch.uint8), chunk, first, count)
            first += count
        self.end()

    def check(self):
        """No rank of this one fails."""

    def close(self):
        self.closed = True


@pytest.fixture
def job(tmp_path):
    preset = load_preset("wan-tiny")
    return RenderJob(
        preset=preset, timeline=Timeline.of("a red ball"), seed=3, width=64, height=48, fps=Fraction(16), frames=33,
        steps=preset.steps, window=3, bias=1.0, anchor="anchor-only", random_weights=True, device="cpu",
        output=tmp_path / "x.mp4", stats=tmp_path / "s.json", trace=tmp_path / "t.json",
    )  # fmt: skip


@pytest.fixture
def run(monkeypatch, job):
    """Renders `job` with a fake pipeline: (observer, pipeline)."""

    def run(pipeline, changed=job, **kwargs):
        monkeypatch.setattr(assemble, "build_pipeline", lambda *args: pipeline)
        observer = Watcher()
        try:
            return render(changed, observer, **kwargs), observer
        finally:
            assert observer.closed == 1
            run.observer = observer

    return run


def raising(error):
    def end():
        raise error

    return end


def frames_in(path):
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_all_goes_well(run, job):
    result, observer = run(FakePipeline(3))
    assert (result.output, result.frames, result.chunks) == (job.output, 33, 3)
    assert frames_in(job.output) == 33
    assert observer.summary.frames == 33
    assert observer.summary.stopped == ""
    assert observer.snapshots[-1].frames_done == 33


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (RunError("chunk 2: NaN or Inf in the transformer's latents"), RunError, "chunk 2"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RunError, "--size"),
        (MemoryError(), RunError, "out of memory"),
        (ZeroDivisionError("division by zero"), RunError, "unexpected ZeroDivisionError"),
    ],
)
def test_a_failure_keeps_the_whole_chunks(run, job, error, expected, words):
    pipeline = FakePipeline(2, raising(error))
    with pytest.raises(expected, match=words) as caught:
        run(pipeline)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert frames_in(job.output) == 21
    assert pipeline.closed
    assert json.loads(job.stats.read_text())["stats"]["frames"] == 21
    assert json.loads(job.trace.read_text())["traceEvents"]
    assert words in run.observer.summary.stopped


def test_a_failure_before_the_first_frame_leaves_nothing(run, job, tmp_path):
    with pytest.raises(RunError):
        run(FakePipeline(0, raising(RunError("no"))))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "t.json"]
    assert run.observer.summary is None


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_cancelled(run, job, signum, code):
    cancel = Cancel()

    def end():
        cancel.ask(signum)
        cancel.check()

    with pytest.raises(CancelledError) as caught:
        run(FakePipeline(2, end), cancel=cancel)
    assert caught.value.exit_code == code
    assert frames_in(job.output) == 21


def test_a_run_that_was_asked_to_end_says_so_before_it_does(job):
    cancel = Cancel()
    monitor = Monitor(job, Watcher(), ending=lambda: cancel.asked)
    assert monitor.snapshot().phase is Phase.LOADING
    monitor.watch(Recorder(), lambda snapshot: snapshot)
    assert monitor.snapshot().phase is Phase.RUNNING
    cancel.ask()
    assert monitor.snapshot().phase is Phase.FINISHING


def test_a_sink_that_fails_is_an_output_error(run, job, monkeypatch):
    def full(self, pixels):
        raise OutputError("x.mp4: the disk is full")

    monkeypatch.setattr(QueuedSink, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        run(FakePipeline(3))


def test_the_target_is_checked_before_anything_is_built(run, job):
    job.output.write_bytes(b"mine")
    never = FakePipeline(3)
    with pytest.raises(UsageError, match="--force"):
        run(never)
    assert not never.closed
    result, _ = run(FakePipeline(1), replace(job, force=True))
    assert result.frames == 9


def test_no_output_is_refused(run, job):
    with pytest.raises(UsageError, match="-o"):
        run(FakePipeline(1), replace(job, output=None))


def test_metadata_says_how_it_was_made(run, job):
    from wanrt.output.metadata import read_metadata

    scenes = (Scene((("a", 1.0),), 0, 0), Scene((("b", 0.7), ("c", 0.3)), 9, 1))
    titled = replace(job, timeline=Timeline(scenes), title="Two")
    run(FakePipeline(1), titled)
    found = read_metadata(job.output)
    assert found["prompt"] == "a | 0.7 b + 0.3 c"
    assert found["seed"] == "3"
    assert found["preset"] == "wan-tiny"
    assert "random" in found["weights"]
    assert "weights" not in metadata(replace(job, random_weights=False))
    assert scene_text((("x", 1.0),)) == "x"


def test_pixels_reach_the_file(run, job):
    import av

    run(FakePipeline(2))
    with av.open(str(job.output)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert abs(np.mean(frames[0]) - 0) < 3
    assert abs(np.mean(frames[20]) - 10) < 3


def test_allocation_failures_of_the_cpu_are_recognised():
    with pytest.raises(RunError, match="out of memory"), one_line_errors():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
