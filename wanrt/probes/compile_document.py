"""A measurement of `wanrt probe-compile` as JSON, and back. Reading is strict: what is compared must be comparable."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import UsageError
from wanrt.probes.compile_kernels import Work

if TYPE_CHECKING:
    from wanrt.probes.compile_probe import CompileReport

KIND = "wanrt probe-compile"
SCHEMA = 1
SAME = (
    "preset",
    "size",
    "layers",
    "steps",
    "window",
    "dtype",
    "backend",
)  # settings that two files must share


def document(report: CompileReport) -> dict[str, Any]:
    """The whole report as plain data. Milliseconds, bytes, GFLOP/s and GB/s."""
    passes = [
        {
            "variant": {"path": run.variant.path, "compiled": run.variant.compiled},
            "passes": [
                {
                    **asdict(p),
                    "busy_ms": p.busy_ms,
                    "gap_ms": p.gap_ms,
                    "removable_ms": report.removable_ms(p),
                }
                for p in run.passes
            ],
        }
        for run in report.runs
    ]
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "wanrt": report.version,
        "device": report.device,
        "machine": report.machine,
        "settings": report.settings,
        "ceilings": asdict(report.ceilings),
        "tracing": [asdict(tracing) for tracing in report.tracing],
        "events": [asdict(event) for event in report.events],
        "traffic": report.traffic_document(),
        "variants": passes,
    }


def read(path: Path) -> dict[str, Any]:
    """A document from a file, checked. Raises `UsageError` for a file that is missing, foreign, old or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as bad:
        raise UsageError(f"{path}: {bad.strerror}; expected a file from wanrt probe-compile --json") from None
    except ValueError:
        raise UsageError(f"{path}: not JSON; expected a file from wanrt probe-compile --json") from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UsageError(f"{path}: not a measurement of wanrt probe-compile; make one with --json FILE")
    if found.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: got schema {found.get('schema')!r}, expected {SCHEMA}; measure again with this wanrt"
        )
    try:
        _check(found)
    except (KeyError, TypeError, ValueError) as bad:
        raise UsageError(
            f"{path}: damaged measurement ({type(bad).__name__}: {bad}); measure again"
        ) from None
    return found


def _check(found: dict[str, Any]) -> None:
    """Touch everything that a comparison reads."""
    str(found["device"]), found["machine"]["versions"]
    for name in SAME:
        found["settings"][name]
    if not found["variants"]:
        raise ValueError("no variants")
    for run in found["variants"]:
        str(run["variant"]["path"]), bool(run["variant"]["compiled"])
        for p in run["passes"]:
            str(p["name"])
            if not float(p["wall_ms"]) > 0:
                raise ValueError(f"wall_ms {p['wall_ms']}")
            for work, share in p["classes"].items():
                Work(work), float(share["ms"]), int(share["count"])


def check_comparable(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> None:
    """Raise `UsageError` naming the first setting in which two documents differ."""
    for key in SAME:
        mine, theirs = a["settings"][key], b["settings"][key]
        if mine != theirs:
            raise UsageError(
                f"--compare: not comparable: {names[0]} has {key} {_show(mine)}, {names[1]} {_show(theirs)}; "
                "measure both with the same settings"
            )


def _show(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
