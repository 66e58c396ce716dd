"""What `wanrt probe-compile` does with its options. Findings go to stdout, talk to stderr."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wanrt.errors import UsageError
from wanrt.panel import make_observer
from wanrt.pipeline.devices import choose_attention, choose_device, choose_precision, set_threads
from wanrt.pipeline.run import one_line_errors
from wanrt.pipeline.startup import Startup
from wanrt.probes.compile_compare import compare
from wanrt.probes.compile_document import check_comparable, document, read
from wanrt.probes.tables import console
from wanrt.script import units
from wanrt.script.preset import load_preset
from wanrt.telemetry.files import check_measurement, write_json


@dataclass(frozen=True)
class Request:
    """The command's options, as they were given."""

    preset: str = "wan-tiny"
    size: str | None = None
    layers: int | None = None
    precision: str = "auto"
    attention: str = "auto"
    device: str = "auto"
    backend: str = "inductor"
    seed: int = 0
    json: Path | None = None
    compare: tuple[Path, Path] | None = None


def run(request: Request) -> None:
    """Answer the request. Raises `UsageError` for options or files that do not fit."""
    if request.compare is None:
        _probe(request)
    elif request != Request(compare=request.compare):
        raise UsageError("--compare reads two files and measures nothing: give it without other options")
    else:
        _compare(*request.compare)


def _probe(request: Request) -> None:
    from wanrt.probes.compile_probe import probe
    from wanrt.probes.compile_report import render
    from wanrt.probes.compile_subject import open_subject

    preset, size = load_preset(request.preset), _size(request.size)
    if request.json is not None:
        check_measurement(request.json)
    device = choose_device(request.device)
    precision = choose_precision(request.precision, device)
    attention = choose_attention(request.attention, device, precision, preset.transformer_config().head_dim)
    set_threads(device)
    talk = Startup(make_observer("plain").log)
    with one_line_errors():
        talk.tell("model")
        subject = open_subject(
            preset,
            size=size,
            layers=request.layers,
            device=device,
            dtype=precision.transformer,
            attention=attention,
            backend=request.backend,
            seed=request.seed,
        )
        report = probe(subject, talk.tell)
    if request.json is not None:
        write_json(request.json, document(report))
    console().print(render(report))


def _size(text: str | None) -> tuple[int, int] | None:
    try:
        return None if text is None else units.size(text)
    except units.Expected as bad:
        raise UsageError(f"--size: got {text!r}, expected {bad}") from None


def _compare(first: Path, second: Path) -> None:
    from wanrt.probes.compile_report import render_comparison

    a, b = read(first), read(second)
    names = str(first), str(second)
    check_comparable(a, b, names)
    found = compare(a, b, names)
    if not found:
        raise UsageError(f"--compare: {first} and {second} have no path measured both eager and compiled")
    versions = str(a["machine"]["versions"].get("torch")), str(b["machine"]["versions"].get("torch"))
    console().print(render_comparison(found, versions))
