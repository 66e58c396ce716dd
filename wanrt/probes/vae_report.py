"""A probe report on the terminal: verdicts first, then one table per question; and the family's table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wanrt.errors import UsageError
from wanrt.probes.tables import titled, verdicts
from wanrt.probes.vae_anchor import Anchor
from wanrt.probes.vae_cost import Cost, LayerCost, RunCost
from wanrt.probes.vae_partial import SingleLatent, StepResult, Workaround
from wanrt.probes.vae_probe import TITLES, Causalities, Finding, ProbeReport, Reaches

if TYPE_CHECKING:
    from wanrt.probes.vae_family import FamilyRow


def render(report: ProbeReport) -> RenderableType:
    """The whole report."""
    parts: list[RenderableType] = [
        Text(f"{report.subject}: {report.weights}; {report.device}, {report.dtype}")
    ]
    parts.append(verdicts((TITLES[f.question], f.verdict, f.answer) for f in report.findings))
    for finding in report.findings:
        parts += ["", *_tables(finding)]
    return Group(*parts)


def _tables(finding: Finding) -> Iterator[RenderableType]:
    data = finding.data
    if isinstance(data, SingleLatent):
        yield _single(data)
    elif isinstance(data, Causalities):
        yield _causality(data)
    elif isinstance(data, Reaches):
        yield from _reach(data)
    elif isinstance(data, Cost):
        yield from _cost(data)
    elif isinstance(data, Anchor):
        yield _anchor(data)
    elif isinstance(data, tuple):
        yield _workarounds(data)


def number(value: float | None) -> str:
    """Three digits, or words for what has none."""
    if value is None:
        return "-"
    if value == float("inf"):
        return "none"
    return "0" if value == 0 else f"{value:.2g}"


def _single(data: SingleLatent) -> Table:
    table = titled(
        "T=1 against the whole decode", "latent", "fresh: frames", "error", "carried: frames", "error"
    )
    table.add_column("bits", justify="right")
    carried: list[StepResult | None] = list(data.carried) or [None] * len(data.fresh)
    for fresh, step in zip(data.fresh, carried, strict=True):
        cells = [str(fresh.latent), f"{fresh.frames} of {fresh.expected_frames}", number(fresh.error)]
        if step is None:
            cells += ["-", "-", "-"]
        else:
            bits = {True: "equal", False: "differ", None: "-"}[step.bit_identical]
            cells += [f"{step.frames} of {step.expected_frames}", number(step.error), bits]
        table.add_row(*cells)
    return table


def _causality(data: Causalities) -> Table:
    columns = ("half", "earlier outputs", "later outputs", "causal")
    table = titled("Largest change when one input is perturbed, share of the scale", *columns)
    for half in data.halves:
        peak = max(max(row) for row in half.change)
        table.add_row(half.half, number(half.bleed), number(peak), "yes" if half.causal else "NO")
    return table


def _reach(data: Reaches) -> Iterator[RenderableType]:
    table = titled(
        "Temporal receptive field", "half", "structure (gradient)", "felt above 0.1 %", "above 1 %"
    )
    table.add_column("unit")
    for reach, unit in ((data.decoder, "latents"), (data.encoder, "pixel frames")):
        if reach is not None:
            far = f"{reach.history}" if reach.complete else f">= {reach.history}"
            table.add_row(
                reach.half, far, str(reach.history_at["0.001"]), str(reach.history_at["0.01"]), unit
            )
    yield table
    needed = data.warm_up.needed
    warm = titled("Warm-up latents of a stateless decode", *needed, "minimum T")
    beyond = f"> {len(data.warm_up.errors) - 1}"
    warm.add_row(*(beyond if n is None else str(n) for n in (*needed.values(), data.warm_up.minimum_t)))
    yield warm
    for reach in (data.decoder, data.encoder):
        if reach is not None:
            rows = titled(
                f"Receptive field behind each layer, {reach.half}", "layer", "frames/latent", "frames"
            )
            rows.add_column("latents", justify="right")
            rows.add_column("above 1 %", justify="right")
            for row in reach.layers:
                cells = (row.frames_per_latent, row.frames, row.latents, row.latents_at["0.01"])
                rows.add_row(row.layer, *map(str, cells))
            yield rows


def _workarounds(rows: Sequence[Workaround]) -> Table:
    table = titled("Decoding the newest latent", "way", "latents", "largest error", "rms", "ms")
    for row in rows:
        table.add_row(
            row.name, str(row.latents_decoded), number(row.error), number(row.rms), f"{row.milliseconds:.1f}"
        )
    return table


def _cost(data: Cost) -> Iterator[RenderableType]:
    state = "" if data.state_megabytes is None else f", state {data.state_megabytes:.1f} MiB"
    title = (
        f"{data.size[0]}x{data.size[1]}, {data.dtype}: weights {data.weight_megabytes:.1f} MiB{state}; "
        f"roofline {data.roofline.gflops:,.0f} GFLOP/s, {data.roofline.gigabytes:.0f} GB/s"
    )
    table = titled(title, "run", "frames", "ms", "ms/latent", "GFLOP", "floor ms", "live MB")
    for run in data.runs:
        gflop = sum(row.gflop for row in run.layers)
        floor = sum(row.floor(data.roofline) for row in run.layers)
        cells = (
            f"{run.milliseconds:.1f}",
            f"{run.milliseconds / run.latents:.1f}",
            f"{gflop:.2f}",
            f"{floor:.1f}",
            f"{run.live_megabytes:.1f}",
        )
        table.add_row(run.name, str(run.frames), *cells)
    yield table
    yield _groups(data)
    yield _group_costs(data, steady(data))
    yield _top_layers(data, steady(data))


def steady(data: Cost) -> RunCost:
    """The run that matters most: one steady latent, or the first there is."""
    return next((run for run in data.runs if run.name.startswith("steady latent")), data.runs[0])


def _groups(data: Cost) -> Table:
    table = titled("Milliseconds per group", "group", *(run.name for run in data.runs))
    names = list(dict.fromkeys(name for run in data.runs for name in run.by_group()))
    for name in names:
        cells = []
        for run in data.runs:
            row = run.by_group().get(name)
            total = sum(layer.milliseconds for layer in run.layers) or 1.0
            cells.append(f"{row.milliseconds:.1f} ({100 * row.milliseconds / total:.0f} %)" if row else "-")
        table.add_row(name, *cells)
    return table


COST_COLUMNS = ("ms", "GFLOP", "MB", "live MB", "floor ms", "of floor")


def cost_cells(row: LayerCost, floor: float) -> tuple[str, ...]:
    """A layer or a group under `COST_COLUMNS`; `floor` in milliseconds."""
    reached = "-" if row.group == "glue" else f"{100 * floor / max(row.milliseconds, 1e-9):.0f} %"
    return (
        f"{row.milliseconds:.2f}",
        f"{row.gflop:.3f}",
        f"{row.megabytes:.1f}",
        f"{row.live_megabytes:.1f}",
        f"{floor:.2f}",
        reached,
    )


def slowest(run: RunCost, count: int) -> list[LayerCost]:
    """The layers that take longest, longest first."""
    return sorted(run.layers, key=lambda row: -row.milliseconds)[:count]


def _group_costs(data: Cost, run: RunCost) -> Table:
    table = titled(f"Groups of: {run.name}", "group", "layers", *COST_COLUMNS)
    for name, row in run.by_group().items():
        members = [layer for layer in run.layers if layer.group == name]
        floor = sum(layer.floor(data.roofline) for layer in members)
        table.add_row(name, "-" if name == "glue" else str(len(members)), *cost_cells(row, floor))
    return table


def _top_layers(data: Cost, run: RunCost) -> Table:
    table = titled(f"Slowest layers of: {run.name}", "layer", "group", *COST_COLUMNS)
    for row in slowest(run, 12):
        table.add_row(row.layer, row.group, *cost_cells(row, row.floor(data.roofline)))
    return table


def _anchor(data: Anchor) -> Table:
    table = titled("Repeated round trips", "trips", "latent rms", "PSNR dB")
    for trip in data.trips:
        if trip.count in (1, 2, 3, 5, 10, 15, 20):
            table.add_row(str(trip.count), number(trip.latent_rms), f"{trip.psnr:.1f}")
    return table


FAMILY_COLUMNS = (
    "VAE",
    "causal",
    "frames of T=1, 2, 3",
    "first frame special",
    "minimum T",
    "goes through time in",
    "history",
    "future",
    "exact partial decode",
)


def family_cells(row: FamilyRow) -> tuple[str, ...]:
    """One row of the family's table."""
    bleed = "yes"
    if not row.causal:
        kept = ", through GroupNorm only" if row.bleed_without_norm <= 1e-6 else ""
        bleed = f"no ({row.bleed:.1g}{kept})"
    beyond = ">= " if row.history >= row.reach_clip - 2 else ""
    beyond_future = ">= " if row.future >= row.reach_clip - 1 else ""
    return (
        row.title,
        bleed,
        ", ".join(str(row.frames.get(n, "refused")) for n in (1, 2, 3)),
        "yes" if row.first_special else "no",
        str(row.minimum_t),
        row.method,
        f"{beyond}{row.history}",
        f"{beyond_future}{row.future}",
        row.partial,
    )


def family_table(rows: Sequence[FamilyRow]) -> Table:
    """`--all` on the terminal."""
    table = Table(
        title="Video VAEs of diffusers", title_justify="left", title_style="bold", header_style="dim"
    )
    for column in FAMILY_COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*family_cells(row))
    return table


def family_markdown(rows: Sequence[FamilyRow], diffusers_version: str) -> str:
    """`--all` for a page, with how it came about."""
    lines = ["| " + " | ".join(FAMILY_COLUMNS) + " |", "|" + "---|" * len(FAMILY_COLUMNS)]
    lines += ["| " + " | ".join(family_cells(row)) + " |" for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"diffusers {diffusers_version}, random weights, narrow models of default depth, fp64. History and "
            "future are counted in latents; a number after `no` is the largest change that a later latent makes "
            "to an earlier frame, as a share of the scale.",
        ]
    )


BEGIN, END = "<!-- probe-vae --all: begin -->", "<!-- probe-vae --all: end -->"


def write_section(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a Markdown file. Raises `UsageError` without them."""
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as bad:
        raise UsageError(f"--into {path}: {bad.strerror}; expected a Markdown file with the markers") from bad
    if BEGIN not in page or END not in page:
        raise UsageError(f"--into {path}: got no markers, expected the lines {BEGIN} and {END}")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    path.write_text(re.sub(pattern, lambda _m: f"{BEGIN}\n{text}\n{END}", page, flags=re.S), encoding="utf-8")
