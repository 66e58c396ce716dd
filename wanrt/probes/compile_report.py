"""A compile report, or the comparison of two, on the terminal: verdicts first, then tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wanrt.probes.compile_compare import CLASSES, WORDS, Comparison, Gain
from wanrt.probes.compile_graphs import Event, Tracing
from wanrt.probes.compile_kernels import Work
from wanrt.probes.compile_probe import CompileReport, fusible_ms
from wanrt.probes.tables import titled, verdicts

SHOWN_KERNELS = 6
NOISE = -0.05  # gaps below this share of the wall time say that clock and profiler met different loads


def render(report: CompileReport) -> RenderableType:
    """The whole report."""
    return Group(Text(_head(report)), verdicts(report.verdicts()), *_spaced(_tables(report)))


def _head(report: CompileReport) -> str:
    s = report.settings
    width, height = s["size"]
    return (
        f"{s['preset']}, {s['layers']} of {s['layers_of']} layers, {width}x{height}, random weights; "
        f"{report.device}, {s['dtype']}; compiled by {s['backend']}; {s['paths']}"
    )


def _spaced(tables: Iterator[Table | Text]) -> Iterator[RenderableType]:
    for table in tables:
        yield ""
        yield table


def _tables(report: CompileReport) -> Iterator[Table | Text]:
    yield _times(report)
    busy = [p for run in report.runs for p in run.passes if p.gap_ms < NOISE * p.wall_ms]
    if busy:
        yield Text(
            "Kernels seem to take longer than the clock says: other programs were busy here. Measure again."
        )
    for name in report.traffic["plain"]:
        yield _classes(report, name)
    yield _fusion(report)
    if "own" not in report.traffic:
        yield Text(
            "No columns for wanrt's own kernels: they need CUDA and Triton; here its path is the plain one."
        )
    yield _ceilings(report)
    yield _tracing(report.tracing)
    yield _events(report.events)
    yield _kernels(report)


def _times(report: CompileReport) -> Table:
    table = titled("Time, ms", "variant", "pass", "wall", "kernels", "gaps", "gaps/wall", "host queues")
    for run in report.runs:
        for p in run.passes:
            host = "-" if p.host_ms is None else f"{p.host_ms:.2f}"
            cells = (
                f"{p.wall_ms:.2f}",
                f"{p.busy_ms:.2f}",
                f"{p.gap_ms:.2f}",
                _percent(p.gap_ms / p.wall_ms),
                host,
            )
            table.add_row(run.variant.name, p.name, *cells)
    return table


def _classes(report: CompileReport, name: str) -> Table:
    runs = [(run.variant.name, next(p for p in run.passes if p.name == name)) for run in report.runs]
    columns = (column for variant, _ in runs for column in (f"{variant}: ms", "kernels"))
    table = titled(f"By class of work: {name}", "class", *columns)
    for work in Work:
        shares = [p.classes.get(work) for _, p in runs]
        if any(shares):
            cells = [
                ("-", "-") if share is None else (f"{share.ms:.3f}", str(share.count)) for share in shares
            ]
            table.add_row(str(work), *(cell for pair in cells for cell in pair))
    return table


def _fusion(report: CompileReport) -> Table:
    columns = "needed MB", "moved MB", "floor ms", "elementwise + copy ms", "removable ms", "of wall"
    table = titled("Between products: bytes, and time against them", "variant", "pass", *columns)
    for run in report.runs:
        for p in run.passes:
            traffic = report.traffic[run.variant.path][p.name]
            needed = report.traffic["plain"][p.name].needed
            # what a compiler's kernels move is not known; more than their time allows it cannot be
            bound = fusible_ms(p) * report.ceilings.gigabytes
            moved = f"<= {bound:.1f}" if run.variant.compiled else f"{traffic.moved / 1e6:.1f}"
            removable = report.removable_ms(p)
            cells = f"{needed / 1e6:.1f}", moved, f"{report.floor_ms(p.name):.3f}", f"{fusible_ms(p):.3f}"
            table.add_row(
                run.variant.name, p.name, *cells, f"{removable:.3f}", _percent(removable / p.wall_ms)
            )
    return table


def _ceilings(report: CompileReport) -> Table:
    table = titled("Device ceilings, measured", "what", "rate")
    table.add_row(
        f"matrix product, {report.settings['dtype']}", f"{report.ceilings.gflops / 1e3:,.2f} TFLOP/s"
    )
    table.add_row("copy, reads and writes", f"{report.ceilings.gigabytes:,.1f} GB/s")
    return table


def _tracing(found: Sequence[Tracing]) -> Table:
    table = titled("Graphs of a whole pass", "pass", "graphs", "operators", "breaks")
    for tracing in found:
        table.add_row(tracing.name, str(tracing.graphs), str(tracing.operators), str(len(tracing.breaks)))
        for b in tracing.breaks:
            table.add_row(f"  {b.file}:{b.line}: {b.reason}", "", "", "")
    return table


def _events(events: Sequence[Event]) -> Table:
    table = titled("A stream with compiled layers: graphs compiled at each change", "change", "graphs")
    table.add_column("guard that failed", overflow="fold")
    for event in events:
        guards = "; ".join(dict.fromkeys(c.guard or "first of its code" for c in event.compiled))
        table.add_row(
            event.name if not event.live else f"{event.name} (live)", str(len(event.compiled)), guards
        )
    return table


def _kernels(report: CompileReport) -> Table:
    table = titled("Longest kernels of a denoising step", "variant")
    for column in ("class", "kernel"):
        table.add_column(column, no_wrap=True, overflow="ellipsis", max_width=72)
    for column in ("count", "ms"):
        table.add_column(column, justify="right")
    for run in report.runs:
        for kernel in run.passes[-1].kernels[:SHOWN_KERNELS]:
            table.add_row(
                run.variant.name, kernel.work, Text(kernel.name), str(kernel.count), f"{kernel.ms:.3f}"
            )
    return table


def render_comparison(found: Sequence[Comparison], versions: tuple[str, str]) -> RenderableType:
    """Sentences first, then a table for each path."""
    parts: list[RenderableType] = []
    for comparison in found:
        headline, *reasons = comparison.sentences()
        parts += [Text(headline, style="bold"), *(Text(f"  {reason}") for reason in reasons), ""]
    if versions[0] != versions[1]:
        parts += [Text(f"Note: measured with different torch versions, {versions[0]} and {versions[1]}."), ""]
    for comparison in found:
        parts += [_comparison(comparison), ""]
    return Group(*parts[:-1])


def _comparison(c: Comparison) -> Table:
    title = f"{c.path}: a chunk eager and compiled, ms; points of gain, which add up to the gains"
    table = titled(title, "class")
    for gain in (c.a, c.b):
        for column in (f"{gain.device}: eager", "compiled", "points"):
            table.add_column(column, justify="right")
    table.add_column("difference", justify="right")
    for work in CLASSES:
        if any(gain.eager[work] or gain.compiled[work] for gain in (c.a, c.b)):
            points = f"{100 * float(c.points(work)):+.2f}"
            table.add_row(WORDS[work], *_cells(c.a, work), *_cells(c.b, work), points)
    table.add_section()
    table.add_row("all", *_sums(c.a), *_sums(c.b), f"{100 * float(c.difference):+.2f}")
    return table


def _cells(gain: Gain, work: str) -> tuple[str, str, str]:
    points = f"{100 * float(gain.points(work)):+.2f}"
    return f"{float(gain.eager[work]):.2f}", f"{float(gain.compiled[work]):.2f}", points


def _sums(gain: Gain) -> tuple[str, str, str]:
    total = f"{100 * float(gain.total):+.2f}"
    return f"{float(gain.eager_ms):.2f}", f"{float(gain.compiled_ms):.2f}", total


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")
