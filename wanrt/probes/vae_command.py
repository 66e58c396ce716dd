"""What `wanrt probe-vae` does with its options. Findings go to stdout, talk to stderr."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from wanrt.errors import OutputError, UsageError
from wanrt.probes.tables import console
from wanrt.probes.vae_open import open_subject
from wanrt.probes.vae_probe import choose, probe
from wanrt.probes.vae_subject import Subject

if TYPE_CHECKING:
    from wanrt.probes.vae_family import FamilyRow

log = logging.getLogger("wanrt.probes")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SIZES = {"wan": (576, 320), "lightvae": (576, 320), "taehv": (576, 320)}  # without --size, on a GPU


@dataclass(frozen=True)
class Request:
    """The command's options, as they were given."""

    vae: str = "wan-tiny"
    only: str | None = None
    json: bool = False
    html: Path | None = None
    every: bool = False
    into: Path | None = None
    size: str | None = None
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    weights: Path | None = None
    random_weights: bool = False


def run(request: Request) -> None:
    """Answer the request. Raises `UsageError` for options that do not fit, `OutputError` for an unwritable page."""
    if request.into is not None and not request.every:
        raise UsageError("--into needs --all: it places the table of all VAEs")
    if request.every:
        _family(request)
    else:
        _one(request)


def _one(request: Request) -> None:
    questions = choose(request.only)
    subject = _subject(request)
    with Console(stderr=True).status("") as status:
        report = probe(subject, questions, lambda title: status.update(f"{subject.name}: {title}"))
    if request.html is not None:
        from wanrt.probes.vae_page import page

        _write(request.html, page(report))
    if request.json:
        print(json.dumps(report.as_dict(), indent=2))
        return
    from wanrt.probes.vae_report import render

    console().print(render(report))


def _subject(request: Request) -> Subject:
    device = request.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device: got {device}, but no CUDA device was found; use cpu")
    if request.precision not in DTYPES:
        raise UsageError(f"--precision: got {request.precision!r}, expected one of {', '.join(DTYPES)}")
    subject = open_subject(
        request.vae,
        device=device,
        dtype=DTYPES[request.precision],
        seed=request.seed,
        weights=request.weights,
        random_weights=request.random_weights,
    )
    size = _size(request.size, subject) if request.size else None
    if size is None and device != "cpu":
        size = SIZES.get(request.vae)
    log.info("probing %s: %s, on %s", subject.name, subject.weights, device)
    return subject if size is None else dataclasses.replace(subject, size=size)


def _size(text: str, subject: Subject) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageError(f"--size: got {text!r}, expected WIDTHxHEIGHT such as 224x128")
    factor = subject.spatial_factor
    if int(width) % factor or int(height) % factor:
        raise UsageError(f"--size: got {text}, expected multiples of {factor} for {subject.name}")
    return int(width), int(height)


def _family(request: Request) -> None:
    from wanrt.probes.vae_family import FAMILY, examine
    from wanrt.probes.vae_report import family_markdown, family_table, write_section

    rows: list[FamilyRow] = []
    with Console(stderr=True).status("") as status:
        for member in FAMILY:
            status.update(member.title)
            rows.append(examine(member, seed=request.seed))
    if request.into is not None:
        write_section(request.into, family_markdown(rows, _diffusers_version()))
    if request.json:
        print(json.dumps([_row(row) for row in rows], indent=2))
        return
    console().print(family_table(rows))


def _row(row: FamilyRow) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "partial": row.partial, "method": row.method}


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as bad:
        raise OutputError(f"--html {path}: {bad.strerror}; choose a folder that can be written") from bad
