"""A probe report as one self-contained HTML page: no scripts, no fonts or images from elsewhere, plots as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from wanrt.probes.vae_anchor import Anchor
from wanrt.probes.vae_cost import GROUPS, Cost
from wanrt.probes.vae_partial import Causality, SingleLatent, Verdict, Workaround
from wanrt.probes.vae_probe import TITLES, Causalities, Finding, ProbeReport, Reaches
from wanrt.probes.vae_report import COST_COLUMNS, cost_cells, number, slowest, steady

PALETTE = ("#2f6fdb", "#d9822b", "#2c9c6a", "#b0487b", "#7a5cc0", "#4b8f9e", "#8a6d3b", "#8b95a3")

STYLE = """
:root { color-scheme: light dark; --fg: #1b1f24; --dim: #5b6672; --bg: #ffffff; --line: #d6dbe1; --soft: #f3f5f8 }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6e9ee; --dim: #9aa5b1; --bg: #14171b; --line: #333a43; --soft: #1d2228 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { margin: .3rem 0 } .dim { color: var(--dim) }
table { border-collapse: collapse; margin: .8rem 0; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left } th { color: var(--dim); font-weight: 600 }
.verdict { font-weight: 700; padding: .05rem .5rem; border-radius: .3rem; color: #fff }
.YES { background: #23864f } .CONDITIONAL { background: #b26a00 } .NO { background: #c0392b }
.summary td { text-align: left; vertical-align: top }
figure { margin: 1rem 0 } figcaption { color: var(--dim); font-size: .85rem }
.pair { display: flex; gap: 2rem; flex-wrap: wrap }
svg { max-width: 100%; height: auto } svg text { fill: var(--fg); font: 11px system-ui, sans-serif }
svg .axis { stroke: var(--line) } svg .label { fill: var(--dim) }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--dim) }
"""


def page(report: ProbeReport) -> str:
    """The whole page."""
    head = f"<h1>{escape(report.subject)}</h1>" + _p(
        f"{report.weights}; {report.device}; {report.dtype}; wanrt {report.version}, torch {report.torch}",
        dim=True,
    )
    body = "".join(_section(finding) for finding in report.findings)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>wanrt probe-vae: {escape(report.subject)}</title><style>{STYLE}</style></head>"
        f"<body>{head}{_summary(report.findings)}{body}</body></html>\n"
    )


def _p(text: str, *, dim: bool = False) -> str:
    return f'<p class="dim">{escape(text)}</p>' if dim else f"<p>{escape(text)}</p>"


def _badge(verdict: Verdict | None) -> str:
    return f'<span class="verdict {verdict}">{verdict}</span>' if verdict else ""


def _summary(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f"<tr><td><b>{escape(TITLES[f.question])}</b></td><td>{_badge(f.verdict)}</td><td>{escape(f.answer)}</td></tr>"
        for f in findings
    )
    return f'<table class="summary">{rows}</table>'


def _section(finding: Finding) -> str:
    data = finding.data
    if isinstance(data, SingleLatent):
        inner = _single(data)
    elif isinstance(data, Causalities):
        inner = f'<div class="pair">{"".join(map(_heat, data.halves))}</div>'
    elif isinstance(data, Reaches):
        inner = _reach(data)
    elif isinstance(data, Cost):
        inner = _cost(data)
    elif isinstance(data, Anchor):
        inner = _anchor(data)
    elif isinstance(data, tuple):
        inner = _workarounds(data)
    else:
        inner = ""
    took = _p(f"{finding.seconds:.1f} s", dim=True)
    return f"<h2>{escape(TITLES[finding.question])}</h2>{_p(finding.answer)}{inner}{took}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, everything escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{lines}</table>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _single(data: SingleLatent) -> str:
    rows = [
        [f"latent {s.latent}, {kind}", f"{s.frames} of {s.expected_frames}", number(s.error)]
        for kind, steps in (("fresh", data.fresh), ("carried", data.carried))
        for s in steps
    ]
    return table(["decode", "frames", "error"], rows)


def _heat(half: Causality) -> str:
    cell, left, top = 18, 34, 20
    rows, columns = len(half.change), len(half.change[0])
    peak = max(max(row) for row in half.change) or 1.0
    boxes = []
    for y, row in enumerate(half.change):
        for x, value in enumerate(row):
            strength = 0.0 if value == 0 else max(0.06, 1 + math.log10(max(value / peak, 1e-6)) / 6)
            tip = f"input {y}, output {x}: {number(value)}"
            boxes.append(
                f'<rect x="{left + x * cell}" y="{top + y * cell}" width="{cell - 1}" height="{cell - 1}" '
                f'fill="{PALETTE[0]}" fill-opacity="{strength:.3f}" stroke="var(--line)" stroke-width=".5">'
                f"<title>{tip}</title></rect>"
            )
    labels = [_text(left + x * cell + 8, top - 6, str(x), "middle") for x in range(0, columns, 2)]
    labels += [_text(left - 6, top + y * cell + 13, str(y), "end") for y in range(rows)]
    svg = _svg(left + columns * cell + 4, top + rows * cell + 4, "".join(boxes + labels))
    words = ("latent", "pixel frame") if half.half == "decoder" else ("pixel frame", "latent")
    return _figure(
        svg, f"{half.half}: change of each {words[1]} (across) when one {words[0]} (down) is perturbed"
    )


def _svg(width: float, height: float, inner: str) -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {box}>{inner}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def lines(
    series: dict[str, Sequence[float]],
    *,
    x_label: str,
    log: bool,
    start: int = 0,
    size: tuple[int, int] = (460, 250),
) -> str:
    """A line chart; on a log axis zeros and infinities are left out."""
    width, height, left, bottom, top = *size, 46, 36, 14
    points = {name: _points(values, log, start) for name, values in series.items()}
    known = [y for line in points.values() for _, y in line] or [0.0, 1.0]
    low, high = (math.floor(min(known)), math.ceil(max(known))) if log else (min(0.0, min(known)), max(known))
    high = high if high > low else low + 1
    longest = max(len(values) for values in series.values())

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - start) / max(1, longest - 1)
        return left + across * (width - left - 12), top + (high - y) / (high - low) * (height - top - bottom)

    parts = [_grid(low, high, log, place, start, start + longest - 1)]
    for line, colour in zip(points.values(), PALETTE, strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for x, y in (place(*point) for point in line):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>')
    parts.append(_legend(list(series), left + 10, height - bottom + 32))
    parts.append(_text((left + width) / 2, height - 4, x_label, "middle"))
    return _svg(width, height + 22, "".join(parts))


def _points(values: Sequence[float], log: bool, start: int) -> list[tuple[float, float]]:
    usable = [(start + i, v) for i, v in enumerate(values) if math.isfinite(v) and (v > 0 or not log)]
    return [(x, math.log10(v) if log else v) for x, v in usable]


def _grid(low: float, high: float, log: bool, place: object, first: int, last: int) -> str:
    assert callable(place)
    parts = []
    span = range(int(low), int(high) + 1) if log else [low + (high - low) * i / 4 for i in range(5)]
    skip = max(1, len(span) // 7) if log else 1
    for value in list(span)[::skip]:
        (x0, y), (x1, _) = place(first, value), place(last, value)
        parts.append(f'<line class="axis" x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(x0 - 6, y + 4, f"1e{value:.0f}" if log else f"{value:.3g}", "end"))
    step = max(1, (last - first) // 8)
    for tick in range(first, last + 1, step):
        x, y = place(tick, low)
        parts.append(_text(x, y + 15, str(tick), "middle"))
    return "".join(parts)


def _legend(names: Sequence[str], x: float, y: float) -> str:
    parts = []
    for name, colour in zip(names, PALETTE, strict=False):
        parts.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 14, y, name))
        x += 26 + 6.2 * len(name)
    return "".join(parts)


def _reach(data: Reaches) -> str:
    charts = []
    if data.decoder is not None:
        felt = lines({"response": data.decoder.response}, x_label="latents after the changed one", log=True)
        charts.append(
            _figure(felt, "decoder: how strongly a changed latent is felt later, share of its peak")
        )
    error = lines({"error": data.warm_up.errors}, x_label="warm-up latents", log=True)
    charts.append(_figure(error, "stateless decode: error of the last latent, share of the scale"))
    return f'<div class="pair">{"".join(charts)}</div>{_layer_tables(data)}'


def _layer_tables(data: Reaches) -> str:
    parts = []
    for reach in (data.decoder, data.encoder):
        if reach is not None:
            rows = [
                [r.layer, str(r.frames_per_latent), str(r.frames), str(r.latents), str(r.latents_at["0.01"])]
                for r in reach.layers
            ]
            inner = table(["layer", "frames/latent", "frames back", "latents back", "felt above 1 %"], rows)
            parts.append(f"<details><summary>{reach.half}, layer by layer</summary>{inner}</details>")
    return "".join(parts)


def _workarounds(rows: Sequence[Workaround]) -> str:
    cells = [
        [r.name, str(r.latents_decoded), number(r.error), number(r.rms), f"{r.milliseconds:.1f}"]
        for r in rows
    ]
    return table(["way", "latents decoded", "largest error", "rms", "ms"], cells)


def _cost(data: Cost) -> str:
    bars = []
    width, left, row_height = 760, 150, 26
    longest = max(sum(layer.milliseconds for layer in run.layers) / run.latents for run in data.runs) or 1.0
    for index, run in enumerate(data.runs):
        x, y = float(left), index * row_height + 4
        groups = run.by_group()
        for group, colour in zip(GROUPS, PALETTE, strict=True):
            if group in groups:
                wide = groups[group].milliseconds / run.latents / longest * (width - left - 70)
                tip = f"{group}: {groups[group].milliseconds / run.latents:.2f} ms per latent"
                bars.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{row_height - 8}" fill="{colour}">'
                    f"<title>{tip}</title></rect>"
                )
                x += wide
        bars.append(_text(left - 8, y + 13, run.name, "end"))
        bars.append(_text(x + 6, y + 13, f"{run.milliseconds / run.latents:.1f} ms"))
    height = len(data.runs) * row_height
    chart = _svg(width, height + 30, "".join(bars) + _legend(GROUPS, left, height + 22))
    return _figure(
        chart, f"milliseconds per latent at {data.size[0]}x{data.size[1]}, by group of layers"
    ) + _layers(data)


def _layers(data: Cost) -> str:
    run = steady(data)
    rows = [[row.layer, row.group, *cost_cells(row, row.floor(data.roofline))] for row in slowest(run, 16)]
    roof = f"measured roofline: {data.roofline.gflops:,.0f} GFLOP/s, {data.roofline.gigabytes:.0f} GB/s"
    return table(["slowest layers", "group", *COST_COLUMNS], rows) + _p(f"{run.name}; {roof}", dim=True)


def _anchor(data: Anchor) -> str:
    drift = lines({"latent rms": [t.latent_rms for t in data.trips]}, x_label="trips", log=False, start=1)
    quality = lines({"PSNR dB": [t.psnr for t in data.trips]}, x_label="trips", log=False, start=1)
    pair = _figure(drift, "latent against the first encoding, share of its rms") + _figure(
        quality, "picture, dB"
    )
    return f'<div class="pair">{pair}</div>'
