"""Why one device gains more from compiling than another: each gain taken apart by class of work.

A chunk takes T milliseconds eager and t compiled; its gain in speed is T/t - 1. Each is a sum over classes of work
and the gaps between kernels, so the gain is the sum of (T_c - t_c) / t over classes c: *points* of gain. All sums are
in fractions, so that nothing is lost between the parts and the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from wanrt.probes.compile_kernels import Work

GAPS = "gaps"
WORDS = {
    "gemm": "matrix products",
    "attention": "attention",
    "convolution": "convolutions",
    "elementwise": "elementwise, reduction and norm kernels",
    "copy": "copies",
    "collective": "collectives",
    "other": "other kernels",
    GAPS: "gaps between kernels (launches, host)",
}
CLASSES = (*map(str, Work), GAPS)
TOLD = Fraction(1, 10)  # a class that makes less than this share of a difference is not explained in words
MATERIAL = Fraction(6, 5)  # ratios nearer to 1 than this are called alike


@dataclass(frozen=True)
class Gain:
    """One device's step from eager to compiled on one path. Milliseconds a chunk, by class."""

    device: str
    path: str
    eager: Mapping[str, Fraction]
    compiled: Mapping[str, Fraction]

    @property
    def eager_ms(self) -> Fraction:
        """A chunk, eager."""
        return sum(self.eager.values(), Fraction(0))

    @property
    def compiled_ms(self) -> Fraction:
        """A chunk, compiled."""
        return sum(self.compiled.values(), Fraction(0))

    @property
    def total(self) -> Fraction:
        """Gain in speed, 0.53 for 53 %."""
        return self.eager_ms / self.compiled_ms - 1

    def points(self, work: str) -> Fraction:
        """What a class contributes to `total`."""
        return (self.eager[work] - self.compiled[work]) / self.compiled_ms

    def share(self, work: str) -> Fraction:
        """Of the eager time."""
        return self.eager[work] / self.eager_ms

    def removed(self, work: str) -> Fraction:
        """Part of a class's eager time that compiling takes away; 0 where there was none."""
        return 1 - self.compiled[work] / self.eager[work] if self.eager[work] > 0 else Fraction(0)


@dataclass(frozen=True)
class Comparison:
    """Two gains on the same path."""

    a: Gain
    b: Gain

    @property
    def path(self) -> str:
        """Whose code: plain or own."""
        return self.a.path

    @property
    def difference(self) -> Fraction:
        """Of the gains."""
        return self.a.total - self.b.total

    def points(self, work: str) -> Fraction:
        """A class's part of `difference`."""
        return self.a.points(work) - self.b.points(work)

    def sentences(self) -> Iterator[str]:
        """The reasons, the weightiest first."""
        yield _headline(self)
        if not self.difference:
            return
        for work in sorted(CLASSES, key=lambda w: -abs(self.points(w))):
            if abs(self.points(work)) >= TOLD * abs(self.difference):
                yield _reason(self, work)


def gain(document: Mapping[str, Any], path: str) -> Gain | None:
    """The gain of a document on a path ("plain", "own"); None when it was not measured."""
    runs = {(r["variant"]["path"], r["variant"]["compiled"]): r["passes"] for r in document["variants"]}
    if (path, False) not in runs or (path, True) not in runs:
        return None
    steps = int(document["settings"]["steps"])
    eager, compiled = (_chunk(runs[path, on], steps) for on in (False, True))
    return Gain(str(document["device"]), path, eager, compiled)


def _chunk(passes: list[Mapping[str, Any]], steps: int) -> dict[str, Fraction]:
    """Milliseconds of a chunk by class: its denoising step `steps` times, any other pass once."""
    sums = dict.fromkeys(CLASSES, Fraction(0))
    for p in passes:
        times = steps if p["name"] == "denoise" else 1
        parts = {str(Work(work)): Fraction(share["ms"]) for work, share in p["classes"].items()}
        parts[GAPS] = Fraction(p["wall_ms"]) - sum(parts.values(), Fraction(0))
        for work, ms in parts.items():
            sums[work] += times * ms
    return sums


def compare(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> tuple[Comparison, ...]:
    """Every path that both documents measured. `names` stand for devices that have the same name."""
    found = []
    for path in ("plain", "own"):
        first, second = gain(a, path), gain(b, path)
        if first is not None and second is not None:
            if first.device == second.device:
                first, second = (
                    Gain(name, path, g.eager, g.compiled)
                    for name, g in zip(names, (first, second), strict=True)
                )
            found.append(Comparison(first, second))
    return tuple(found)


def _headline(c: Comparison) -> str:
    weightiest = max(CLASSES, key=lambda w: c.points(w) * (1 if c.difference >= 0 else -1))
    start = f"{c.path}: compiling gains {_percent(c.a.total)} on {c.a.device} and {_percent(c.b.total)} on {c.b.device}"
    if not c.difference:
        return f"{start}: no difference."
    share = c.points(weightiest) / c.difference
    return (
        f"{start}; {WORDS[weightiest]} make {_percent(share)} of the difference of "
        f"{_points(c.difference)} points."
    )


def _reason(c: Comparison, work: str) -> str:
    a, b = c.a, c.b
    what = f"{WORDS[work]}, {_points(c.points(work), sign=True)} points: {_did(a, work)}; {_did(b, work)}"
    return f"{what}. {_why(c, work)}"


def _did(g: Gain, work: str) -> str:
    if g.eager[work] <= 0:
        return f"{g.device} spends no eager time there"
    done = g.removed(work)
    verb = f"removes {_percent(done)} of it" if done >= 0 else f"adds {_percent(-done)} to it"
    return f"{g.device} spends {_percent(g.share(work))} of its eager time there and compiling {verb}"


def _why(c: Comparison, work: str) -> str:
    """What differs: how much of it compiling removes, or how large a share it is, and then because of what."""
    a, b = c.a, c.b
    if min(a.eager[work], b.eager[work]) <= 0 or min(_rest(a, work), _rest(b, work)) <= 0:
        return "On one of them there is nothing to weigh it against."
    saved = {g.device: g.eager[work] - g.compiled[work] for g in (a, b)}
    if not _alike(a.removed(work), b.removed(work)):
        return (
            f"The compiler does not do the same there: it saves {_ms(saved[a.device])} a chunk on {a.device}, "
            f"{_ms(saved[b.device])} on {b.device}."
        )
    own, rest = b.eager[work] / a.eager[work], _rest(b, work) / _rest(a, work)
    both = (
        f"On {b.device} this work takes {_times(own)} as long as on {a.device}, "
        f"and all other work {_times(rest)} as long"
    )
    if _alike(own, rest):
        return f"{both}: it weighs the same on both, and the rest of the gain decides."
    if own > rest:
        return f"{both}: so the same part removed weighs more on {b.device}."
    heavy = max((w for w in CLASSES if w != work), key=lambda w: b.eager[w] - own * a.eager[w])
    ratio = f" ({_times(b.eager[heavy] / a.eager[heavy])})" if a.eager[heavy] > 0 else ""
    return f"{both}, most of all {WORDS[heavy]}{ratio}: so the same part removed weighs less on {b.device}."


def _rest(g: Gain, work: str) -> Fraction:
    return g.eager_ms - g.eager[work]


def _alike(x: Fraction, y: Fraction) -> bool:
    low, high = sorted((x, y))
    return low == high or (low > 0 and high / low < MATERIAL)


def _percent(value: Fraction) -> str:
    return f"{float(value):.1%}".replace("%", " %")


def _points(value: Fraction, *, sign: bool = False) -> str:
    return f"{100 * float(value):+.1f}" if sign else f"{100 * float(value):.1f}"


def _ms(value: Fraction) -> str:
    return f"{float(value):.2f} ms"


def _times(value: Fraction) -> str:
    return f"{float(value):.2f}x"
