"""`probe-compile` on a transformer of a few thousand parameters: breaks, recompilations, bytes, times, files."""

import json
import warnings

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from wanrt.errors import RunError, UsageError
from wanrt.models.memory import LOCAL
from wanrt.probes.compile_compare import compare
from wanrt.probes.compile_document import document, read
from wanrt.probes.compile_graphs import Compilation, Event, compilations, trace
from wanrt.probes.compile_kernels import Work
from wanrt.probes.compile_probe import _stays, probe
from wanrt.probes.compile_profile import gpu_kernels, measure_pass
from wanrt.probes.compile_report import render
from wanrt.probes.compile_subject import PLAIN, Variant, open_subject
from wanrt.probes.compile_traffic import Traffic, TrafficTrace, trace_pass
from wanrt.probes.vae_partial import Verdict
from wanrt.script import load_preset

PRESET = """
kind = "model"
name = "small"
title = "small"
transformer = { dim = 48, ffn_dim = 96, num_layers = 3, num_heads = 2, text_dim = 32, text_len = 32 }
cache = { policy = "POLICY", window = WINDOW, sink = SINK }
sampling = { steps = [1000, 625], warped = true }
video = { sizes = ["64x32"] }
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make_subject(tmp_path_factory):
    def make(policy="recompute", window=3, sink=0, **changes):
        file = tmp_path_factory.mktemp("preset") / "small.toml"
        text = PRESET.replace("POLICY", policy).replace("WINDOW", str(window)).replace("SINK", str(sink))
        file.write_text(text)
        given = {"size": None, "layers": 2, "device": CPU, "dtype": torch.float32, "backend": "aot_eager"}
        return open_subject(load_preset(file), **{**given, **changes})

    return make


@pytest.fixture(scope="module")
def subject(make_subject):
    return make_subject()


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def report(subject, told):
    return probe(subject, told.append)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Broken(torch.nn.Module):
    """Two graphs, with a device-to-host copy between."""

    def forward(self, x):
        total = (x * 2).sum()
        factor = total.item()  # the break
        return x * factor


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_break_is_found_with_its_file_and_line():
    found = trace("broken", Broken(), torch.ones(3))
    assert (found.graphs, len(found.breaks)) == (2, 1)
    (place,) = found.breaks
    assert place.file.endswith("test_compile_probe.py")
    line = Broken.forward.__code__.co_firstlineno + 2
    assert (place.line, place.code) == (line, "factor = total.item()  # the break")
    assert "item" in place.reason
    assert not trace("whole", torch.nn.Linear(3, 3), torch.ones(3)).breaks


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_recompilation_is_found_with_its_guard():
    compiled = torch.compile(lambda x, scale: x * scale, backend="eager", dynamic=False)
    first = compilations(lambda: compiled(torch.ones(3), 2.0))
    assert [c.guard for c in first] == [None]
    assert compilations(lambda: compiled(torch.zeros(3), 2.0)) == ()
    (shape,) = compilations(lambda: compiled(torch.ones(4), 2.0))
    assert "size mismatch" in shape.guard
    assert "expected 3, actual 4" in shape.guard
    (value,) = compilations(lambda: compiled(torch.ones(4), 3.0))
    assert "scale" in value.guard
    assert shape.file.endswith("test_compile_probe.py")


def test_a_live_recompilation_is_a_no():
    again = Compilation("forward", "m.py", 3, "bias == 0.3")
    due, fine = Event("chunk 0", False, (again,)), Event("another seed", True, ())
    assert _stays((due, fine))[0] is Verdict.YES
    verdict, answer = _stays((due, fine, Event("another bias", True, (again,))))
    assert verdict is Verdict.NO
    assert "another bias" in answer
    assert "bias == 0.3" in answer


def test_bytes_of_a_chain_by_hand():
    x, w = torch.ones(8, 8), torch.ones(8, 8)
    one = x.numel() * 4

    def chain():
        y = (x * 2 + 1).relu()  # three operators, 6 tensors moved, 2 needed
        return (y @ w) + y  # y again, over a product: read, product read, result written

    assert trace_pass(chain, TrafficTrace()) == Traffic(4, 9 * one, 5 * one)


def test_bytes_of_views_broadcasts_and_buffers():
    buffer, row = torch.zeros(4, 10), torch.ones(10)

    def run():
        buffer[:, :5].copy_(row[:5].expand(4, 5))  # reads 5 numbers, writes 20, keeps them

    assert trace_pass(run, TrafficTrace()) == Traffic(1, 25 * 4, 25 * 4)


def test_fused_operators_move_less_and_need_the_same():
    """At wan-tiny's size tokens outweigh the time embedding; wanrt's own fusion is then near the least possible."""
    subject = open_subject(load_preset("wan-tiny"), size=None, layers=2, device=CPU, dtype=torch.float32)
    for plan in subject.plans().values():
        with subject.arranged(Variant("plain", False)):
            plain = trace_pass(subject.runner(plan), TrafficTrace())
            watched = TrafficTrace()
            subject.model.elementwise = watched.elementwise(LOCAL)
            own = trace_pass(subject.runner(plan), watched)
        assert own.operators < plain.operators / 2
        assert own.moved < plain.moved / 2
        assert own.needed <= own.moved <= 1.02 * own.needed
        assert own.needed == pytest.approx(plain.needed, rel=0.05)


def test_every_policy_has_two_steady_passes(make_subject):
    rolling = make_subject("sink", window=7, sink=1).plans()
    assert list(rolling) == ["commit", "denoise"]
    assert {plan.context for plan in rolling.values()} == {7}
    recompute = make_subject().plans()
    assert [(name, plan.frames, plan.context) for name, plan in recompute.items()] == [
        ("context", 3, 0),
        ("denoise", 3, 3),
    ]


def test_annotations_of_the_gpu_timeline_are_no_kernels():
    def event(name, us, device=DeviceType.CUDA, note=False):
        return FunctionEvent(0, name, 0, 0, us, device_type=device, is_user_annotation=note)

    found = gpu_kernels(
        [
            event("nvjet_tst_256x128", 40),
            event("nvjet_tst_256x128", 60),
            event("triton_poi_fused_add_0", 20),
            event("Torch-Compiled Region: 0/0", 500, note=True),
            event("Context Sync", 700),
            event("aten::addmm", 900, DeviceType.CPU),
        ]
    )
    assert [(k.name, k.work, k.count) for k in found] == [
        ("nvjet_tst_256x128", Work.GEMM, 2),
        ("triton_poi_fused_add_0", Work.ELEMENTWISE, 1),
    ]
    assert [k.ms for k in found] == pytest.approx([0.1, 0.02])


def test_every_part_is_told_before_it_begins(report, told):
    measured = [
        f"{variant}: {name}, {part}"
        for variant, first in (("plain eager", "first run"), ("plain compiled", "compiling"))
        for name in ("context", "denoise")
        for part in (first, "timing")
    ]
    assert told == [
        "device ceilings",
        *(f"graph breaks: {t.name}" for t in report.tracing),
        "bytes between products: plain",
        *measured,
        *(f"recompilations: {event.name}" for event in report.events),
        "device ceilings again",
    ]


def test_the_profiler_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure_pass("sum", lambda: torch.ones(8).sum(), CPU, rounds=2)
    assert found.kernels


def test_the_transformer_traces_whole_and_stays_compiled(report):
    assert [(t.name, t.graphs, t.breaks) for t in report.tracing] == [
        ("time embedding", 1, ()),
        ("context", 1, ()),
        ("denoise", 1, ()),
        ("denoise, biased", 1, ()),
    ]
    compiled = {event.name: len(event.compiled) for event in report.events}
    assert compiled["chunk 0"] > 0
    assert compiled["bias on (0.3)"] > 0
    assert not any(event.compiled for event in report.events if event.live)
    assert [verdict for _, verdict, _ in report.verdicts()] == [Verdict.YES, Verdict.YES, None, None]


def test_every_variant_of_a_cpu_is_timed_by_class(report, subject):
    assert [run.variant.name for run in report.runs] == ["plain eager", "plain compiled"]
    for run in report.runs:
        assert [p.name for p in run.passes] == ["context", "denoise"]
        for p in run.passes:
            assert p.wall_ms == pytest.approx(p.busy_ms + p.gap_ms)
            assert {Work.GEMM, Work.ATTENTION, Work.ELEMENTWISE, Work.COPY} <= set(p.classes)
    # q, k, v, o of two layers, two of the feed-forwards, q and o to the prompt; patches and head
    assert report.run("plain", False).passes[1].classes[Work.GEMM].count == 2 * (4 + 2 + 2) + 1 + 1
    assert subject.model.elementwise is LOCAL
    assert all(block._compiled_call_impl is None for block in subject.model.blocks)


def test_the_document_survives_a_file_and_compares_with_itself(report, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(document(report)))
    found = read(file)
    assert found["settings"]["layers"] == 2
    assert found["traffic"]["plain"]["denoise"]["needed"] > 0
    assert found["variants"][0]["passes"][0]["kernels"]
    (same,) = compare(found, found, ("a", "b"))
    steps = report.settings["steps"]
    eager, compiled = (report.run("plain", on).chunk_ms(steps) for on in (False, True))
    assert float(same.a.total) == pytest.approx(eager / compiled - 1)
    assert same.difference == 0


def test_verdicts_come_first_on_the_terminal(report):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(render(report))
    text = capture.get()
    order = [
        "Does it trace whole?",
        "Does it stay compiled?",
        "Time, ms",
        "By class of work: context",
        "ceilings",
    ]
    assert sorted(order, key=text.index) == order
    assert "they need CUDA and Triton" in text


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_machine_without_a_compiler_is_told_so(make_subject):
    subject = make_subject(backend="inductor")
    (plan, *_) = subject.plans().values()
    broken = {"cpp.cxx": ("/nonexistent/g++",), "force_disable_caches": True}
    with (
        pytest.raises(RunError, match=r"no working C\+\+ compiler.*--backend aot_eager") as caught,
        torch._inductor.config.patch(broken),
        subject.arranged(Variant("plain", True)),
        torch.inference_mode(),
    ):
        subject.runner(plan)()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layers": 1}, "2 to 3"), ({"layers": 9}, "2 to 3"), ({"backend": "x"}, "inductor")],
)
def test_wrong_options(make_subject, changes, message):
    with pytest.raises(UsageError, match=message):
        make_subject(**changes)


@pytest.mark.slow
def test_inductor_fuses_and_its_loops_are_seen(make_subject):
    subject = make_subject(backend="inductor")
    found = {}
    for compiled in (False, True):
        with subject.arranged(Variant("plain", compiled)), torch.inference_mode():
            run = subject.runner(subject.plans()["context"])  # one of two layers in full: one graph
            run()
            found[compiled] = measure_pass("context", run, CPU, rounds=1)
    eager, fused = (found[on].classes[Work.ELEMENTWISE].count for on in (False, True))
    assert any("cpp_fused" in kernel.name for kernel in found[True].kernels)
    assert fused < 0.6 * eager


@pytest.mark.gpu
def test_a_slice_of_14b():
    device = torch.device("cuda", 0)
    subject = open_subject(
        load_preset("krea-14b"), size=(576, 320), layers=2, device=device, dtype=torch.bfloat16
    )
    report = probe(subject)
    assert [run.variant.name for run in report.runs] == [
        "plain eager",
        "own eager",
        "plain compiled",
        "own compiled",
    ]
    assert [verdict for _, verdict, _ in report.verdicts()] == [Verdict.YES, Verdict.YES, None, None]
    eager, own, compiled, _ = (run.passes[1] for run in report.runs)
    for run in report.runs:
        for p in run.passes:
            assert Work.GEMM in p.classes
            assert p.classes.get(Work.ATTENTION) is not None
            unknown = [kernel for kernel in p.kernels if kernel.work is Work.OTHER]
            assert sum(kernel.ms for kernel in unknown) < 0.01 * p.busy_ms, unknown
    counts = [p.classes[Work.ELEMENTWISE].count for p in (eager, own, compiled)]
    assert counts[1] < counts[0] / 2
    assert counts[2] < counts[0] / 2
    assert subject.model.elementwise is not PLAIN
    assert report.ceilings.gflops > 1e5
