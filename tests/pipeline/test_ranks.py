"""Pipelines over rank processes on the CPU: the same video as one process, and what happens when a rank fails."""

import json
import os
import signal
import time
from collections import namedtuple
from dataclasses import replace
from fractions import Fraction

import psutil
import pytest
import torch

from wanrt.errors import RunError, UsageError
from wanrt.pipeline import ranks, render
from wanrt.pipeline.assemble import build_pipeline
from wanrt.pipeline.build import Wiring, settle_topology, topology_of
from wanrt.pipeline.cancel import Cancel, CancelledError
from wanrt.pipeline.loop import to_rgb8
from wanrt.script import Curve, RenderJob, Scene, Timeline
from wanrt.telemetry import Recorder

CPU = torch.device("cpu")


class Acting:
    """An observer that does something to the processes that a run has started, once, when some chunks are made."""

    def __init__(self, action):
        self.action, self.acted, self.others = action, None, children()

    def update(self, snapshot):
        if self.acted is None and snapshot.frames_done >= 21:
            self.acted = time.monotonic()
            self.action([process for process in children() if process not in self.others])

    def log(self, line, level=0):
        pass

    def close(self, summary=None):
        pass


@pytest.fixture(scope="module")
def job(smaller_preset):
    preset = smaller_preset
    scenes = (Scene((("a ball", 1.0),), 0, 0), Scene((("a star", 1.0),), 21, 2, Fraction(12), Curve.LERP))
    return RenderJob(
        preset=preset, timeline=Timeline(scenes), seed=3, width=64, height=64, fps=Fraction(16), frames=45,
        steps=preset.steps, window=3, bias=0.5, anchor="anchor-only", random_weights=True, device="cpu",
    )  # fmt: skip


def video(job, recorder=None, convert=to_rgb8):
    """(latents of all chunks, frames) of a job."""
    pipeline = build_pipeline(job, None, CPU, Wiring(recorder or Recorder(), convert=convert))
    latents, receive = [], pipeline._mesh.receive

    def listening():
        result = receive()
        latents.append(result.latents.clone())
        return result

    pipeline._mesh.receive = listening
    try:
        pixels = torch.cat([frames.pixels for frames in pipeline.run()])
    finally:
        pipeline.close()
    return torch.cat(latents, dim=2), pixels


@pytest.fixture(scope="module")
def single(job):
    return video(job)


def children():
    return [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


@pytest.fixture(autouse=True)
def _no_orphans():
    yield
    assert not children()
    assert not torch.distributed.is_initialized()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ulysses=2", "pp1+tp=4", "pp1+ulysses=2")]


@pytest.mark.parametrize("topology", ["tp=2", "pp1+tp=1", *SLOW])
def test_the_same_video_as_one_process(job, single, topology):
    """Latents in fp32 within 1e-4 of scale, over four chunks and a prompt change."""
    recorder = Recorder()
    latents, pixels = video(replace(job, topology=topology), recorder)
    scale = single[0].abs().max().item()
    torch.testing.assert_close(latents, single[0], rtol=0, atol=1e-4 * scale)
    assert (pixels.int() - single[1].int()).abs().max() <= 1
    mesh_ranks = {stage.rank for stage in recorder.stats().stages if stage.stage == "mesh"}
    assert len(mesh_ranks) == topology_of(replace(job, topology=topology)).mesh


@pytest.mark.slow
def test_policies_agree_within_a_topology(job):
    jobs = [replace(job, topology="pp1+tp=1", anchor=anchor) for anchor in ("decode-all", "anchor-only")]
    (latents, pixels), (other_latents, other_pixels) = (video(j) for j in jobs)
    assert torch.equal(latents, other_latents)
    assert torch.equal(pixels, other_pixels)


HELD, HELD_S = (
    1,
    1.5,
)  # which chunk's conversion is drawn out, and how long: far beyond what the mesh needs for one


def held_up(job, policy):
    """Spans by (stage or name, chunk) of a run that shows one chunk slowly: (start, end) in ns of all of a chunk's."""
    recorder, chunks = Recorder(), iter(range(4))

    def slow(pixels):
        if next(chunks) == HELD:
            time.sleep(HELD_S)
        return to_rgb8(pixels)

    video(replace(job, topology="pp1+tp=1", anchor=policy), recorder, slow)
    found = {}
    for span in recorder.recent(3600):
        passes = span.stage == "mesh" and span.name != "text"  # prompts are taken in while the anchor is made
        key = "mesh" if passes else span.name, span.chunk
        start, end = found.get(key, (span.start_ns, span.end_ns))
        found[key] = min(start, span.start_ns), max(end, span.end_ns)
    return found


@pytest.mark.parametrize("policy", ["anchor-only", "overlap"])
def test_the_mesh_waits_for_the_anchor_and_for_nothing_else(job, policy):
    """While stage 0 shows chunk N the mesh makes all of chunk N + 1; its bubble is the anchor's path."""
    spans = held_up(job, policy)
    mesh, after, shown = spans["mesh", HELD], spans["mesh", HELD + 1], spans["convert", HELD]
    assert after[0] < shown[1]
    assert after[1] <= shown[1], "the next chunk was not done while this one was shown"
    assert spans["anchor-encode", HELD][1] <= after[0], "the mesh began without its anchor"
    if policy == "anchor-only":
        assert spans["display-decode", HELD][0] >= spans["anchor-encode", HELD][1]
    # decode and encode of the anchor, with transfer and wake-up, which are short beside what is held
    path = spans["anchor-encode", HELD][1] - mesh[1]
    assert after[0] - mesh[1] - path < (shown[1] - shown[0]) / 2


def test_the_policy_to_compare_with_does_hold_the_mesh_up(job):
    """decode-all shows a chunk before it submits the next: the same measure sees it."""
    spans = held_up(job, "decode-all")
    shown = spans["convert", HELD]
    assert spans["mesh", HELD + 1][0] >= shown[1]
    assert spans["mesh", HELD + 1][0] - spans["mesh", HELD][1] > shown[1] - shown[0]


def test_a_prompt_is_taken_in_while_the_anchor_is_made(job):
    """The mesh's keys and values of a changed prompt are done before an anchor that is held up for long."""
    recorder = Recorder()
    pipeline = build_pipeline(replace(job, topology="pp1+tp=1"), None, CPU, Wiring(recorder))
    encode = pipeline._pixels._codec.encode

    def slow(index):
        time.sleep(HELD_S)
        return encode(index)

    pipeline._pixels._codec.encode = slow
    try:
        list(pipeline.run())
    finally:
        pipeline.close()
    spans = [(span.name, span.chunk, span.start_ns, span.end_ns) for span in recorder.recent(3600)]
    texts = {chunk: end for name, chunk, _, end in spans if name == "text"}
    anchors = {chunk + 1: end for name, chunk, _, end in spans if name == "anchor-encode"}
    assert texts.keys() == {0, 2, 3}, "a transition of two chunks begins at chunk 2"
    assert all(texts[chunk] < anchors[chunk] for chunk in (2, 3))


def as_floats(pixels):
    return pixels[0].movedim(0, -1).clone()


@pytest.fixture(scope="module")
def wide(job):
    """Twenty latent columns: a VAE split over three ranks has 6, 7 and 7."""
    return replace(job, width=160, height=48)


@pytest.fixture(scope="module")
def wide_single(wide):
    return video(wide, convert=as_floats)


SPLIT = ["ulysses=2+vae=2", pytest.param("tp=2+vae=2", marks=pytest.mark.slow)]
SPLIT += [pytest.param(f"pp1+{rest}", marks=pytest.mark.slow) for rest in ("tp=2+vae=2", "tp=1+vae=3")]
SPLIT += ["pp1+tp=1+vae=2"]


@pytest.mark.parametrize("topology", SPLIT)
def test_a_split_vae_gives_the_same_video(wide, wide_single, topology):
    """Float pixels and latents within 1e-4 of scale, over four chunks and a prompt change."""
    recorder = Recorder()
    found = video(replace(wide, topology=topology), recorder, as_floats)
    for name, got, want in zip(("latents", "pixels"), found, wide_single, strict=True):
        error = ((got - want).abs().max() / want.abs().max()).item()
        print(f"{topology} {name}: {error:.1e}")
        assert got.shape == want.shape
        assert error <= 1e-4
    parts = {stage.rank: stage for stage in recorder.stats().stages if stage.stage == "vae"}
    kind = "vae" if topology.startswith("pp1") else "mesh"
    assert set(parts) == {f"{kind}{rank}" for rank in range(1, int(topology[-1]))}
    for part in parts.values():
        assert part.spans["decode"].count == 12  # each latent once
        assert part.spans["encode"].count == 2  # of the chunks whose context has an anchor


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["tp=2+vae=2", "pp1+tp=1+vae=2"])
def test_policies_agree_under_a_split_vae(wide, topology):
    jobs = [
        replace(wide, topology=topology, anchor=anchor) for anchor in ("decode-all", "overlap", "anchor-only")
    ]
    (latents, pixels), *others = (video(j, convert=as_floats) for j in jobs)
    for other_latents, other_pixels in others:
        assert torch.equal(latents, other_latents)
        assert torch.equal(pixels, other_pixels)


@pytest.mark.slow
def test_a_killed_vae_rank_is_named(wide, tmp_path):
    action = lambda processes: os.kill(processes[0].pid, signal.SIGKILL)  # noqa: E731 (started first: vae1)
    message, _ = rendered(endless(wide, tmp_path, "pp1+tp=1+vae=2"), action)
    assert "vae1 (cpu) failed: killed by signal 9" in message


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("tp=5", r"8 % 5"),
        ("pp1+tp=2+vae=9", "vae=9 > 8, .*; nearest valid: .*vae=8"),
        ("tp=2+tp=2", "topology"),
    ],
)
def test_what_cannot_be_is_refused(job, topology, words):
    with pytest.raises(UsageError, match=words):
        topology_of(replace(job, topology=topology))
    with pytest.raises(UsageError, match=words):
        settle_topology(replace(job, topology=topology), CPU)


def test_what_a_cpu_has_no_memory_for_is_refused_before_it_loads(job, monkeypatch):
    memory = namedtuple("memory", "total")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(8 * 2**30))
    huge = replace(job, width=4096, height=4096, topology="single")
    with pytest.raises(
        UsageError, match=r"needs about .* GiB, its device has 8.0 GiB; take a smaller --size"
    ):
        settle_topology(huge, CPU)
    assert settle_topology(replace(job, topology="single"), CPU)


def test_auto_on_a_cpu_is_one_rank(job):
    assert settle_topology(replace(job, topology="auto"), CPU).topology == "single"


def endless(job, tmp_path, topology="pp1+tp=1"):
    return replace(job, topology=topology, frames=None, output=tmp_path / "x.mp4", stats=tmp_path / "s.json")


def frames_in(path):
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def rendered(job, action, cancel=None):
    """Renders until `action` has its effect: the message, and the seconds from the action to the end."""
    observer = Acting(action)
    with pytest.raises((RunError, CancelledError)) as caught:
        render(job, observer, cancel=cancel)
    took = time.monotonic() - observer.acted
    frames = frames_in(job.output)
    assert frames >= 21
    assert (frames - 9) % 12 == 0
    assert json.loads(job.stats.read_text())["stats"]["frames"] == frames
    return str(caught.value), took


def test_a_killed_rank_is_named_and_the_file_is_finished(job, tmp_path):
    action = lambda processes: os.kill(processes[0].pid, signal.SIGKILL)  # noqa: E731
    message, took = rendered(endless(job, tmp_path), action)
    assert "mesh0 (cpu) failed: killed by signal 9" in message
    assert took < 10


@pytest.mark.slow
def test_a_hanging_rank_is_given_up(job, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "WATCHDOG_S", 4.0)
    action = lambda processes: os.kill(processes[0].pid, signal.SIGSTOP)  # noqa: E731
    message, took = rendered(endless(job, tmp_path), action)
    assert "mesh0 (cpu)" in message
    assert took < 4 + 10


def test_cancel_ends_the_ranks_too(job, tmp_path):
    cancel = Cancel()
    message, _ = rendered(endless(job, tmp_path, "tp=2"), lambda _: cancel.ask(signal.SIGINT), cancel)
    assert "SIGINT" in message


@pytest.mark.slow
def test_every_rank_tells_how_much_it_has_loaded(job):
    heard = []
    wiring = Wiring(Recorder(), progress=lambda *about: heard.append(about))
    build_pipeline(replace(job, topology="tp=2"), None, CPU, wiring).close()
    for name in ("transformer", "mesh1: transformer"):
        (_, begun, *_), *under_way, (_, seconds, *_) = [about for about in heard if about[0] == name]
        fractions = [about[2] for about in under_way]
        assert begun is None
        assert seconds > 0
        assert len(fractions) >= 10
        assert fractions == sorted(set(fractions))
        assert fractions[-1] == 1


def test_loading_can_be_broken_off(job):
    """A 14B takes half a minute: Ctrl-C must not wait for it."""
    cancel, heard = Cancel(), []

    def progress(part, seconds, fraction=None):
        heard.append((part, seconds, fraction))
        if part == "transformer" and (fraction or 0) > 0.3:
            cancel.ask(signal.SIGINT)

    with pytest.raises(CancelledError):
        build_pipeline(job, None, CPU, Wiring(Recorder(), cancel.check, progress))
    part, seconds, fraction = heard[-1]
    assert (part, seconds) == ("transformer", None)
    assert 0.3 < fraction < 1


def test_a_rank_that_cannot_load_is_named(job, monkeypatch):
    """The other rank's checkpoint is gone: its own words reach the user, and stage 0 does not load to the end first."""
    from pathlib import Path

    from wanrt.weights.registry import ModelFiles

    nowhere = ModelFiles(*(Path("/nonexistent") / name for name in ("t", "v", "e", "k")))

    def load_for_a_minute(job, files, device, precision, progress):
        for percent in range(1, 101):
            progress("text encoder", None, percent / 100)
            time.sleep(0.6)
        raise AssertionError("loaded to the end")

    monkeypatch.setattr("wanrt.pipeline.models.load_stage0", load_for_a_minute)
    with pytest.raises(RunError, match=r"mesh0 \(cpu\) failed: .*nonexistent"):
        build_pipeline(replace(job, topology="pp1+tp=1"), nowhere, CPU, Wiring(Recorder()))
