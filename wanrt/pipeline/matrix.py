"""What `wanrt bench` measures: lists of configurations, those with names in order of importance. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from wanrt.errors import UsageError

SIZE = re.compile(r"\d+x\d+")
PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")
COMPILE, NO_P2P = "compile", "no-p2p"
P2P_SWITCH = "NCCL_P2P_DISABLE"  # environment variable, set to 1
FORM = "TOPOLOGY[:ANCHOR][:WxH][:PRECISION][:compile][:no-p2p]"


@dataclass(frozen=True)
class Entry:
    """One line of a matrix: what to run, under which name. None: as the command's options say.

    p2p: False runs it with NCCL_P2P_DISABLE=1, which NCCL reads once in a process.
    """

    topology: str | None = None
    anchor: str | None = None
    compile: bool | None = None
    name: str = ""
    size: str | None = None
    precision: str | None = None
    p2p: bool = True

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read an entry of the form `FORM`. Raises `UsageError` for unknown or repeated parts."""
        topology, *parts = text.strip().split(":")
        found: dict[str, object] = {}
        for part in parts:
            key = _kind(part)
            if not part or key in found:
                raise UsageError(f"matrix entry {text!r}: expected {FORM}")
            found[key] = {COMPILE: True, "p2p": False}.get(key, part)
        if not topology:
            raise UsageError(f"matrix entry {text!r}: expected {FORM}")
        return cls(topology, **found)  # type: ignore[arg-type]

    @property
    def text(self) -> str:
        """The entry as `parse` reads it; `single` without a topology."""
        parts = (
            self.topology or "single",
            self.anchor,
            self.size,
            self.precision,
            COMPILE if self.compile else None,
            None if self.p2p else NO_P2P,
        )
        return ":".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """Its name, or what it is made of."""
        return self.name or self.text.replace(":", " ")

    @property
    def flags(self) -> dict[str, str]:
        """The options of `wanrt bench` that it replaces."""
        given = {
            "topology": self.topology, "anchor": self.anchor, "size": self.size, "precision": self.precision,
        }  # fmt: skip
        return {key: value for key, value in given.items() if value is not None}


def needs_own_process(entry: Entry) -> bool:
    """Whether NCCL must be told of an entry before its process starts; not in the process that was told."""
    return not entry.p2p and P2P_SWITCH not in os.environ


def _kind(part: str) -> str:
    if part == COMPILE:
        return COMPILE
    if part == NO_P2P:
        return "p2p"
    if SIZE.fullmatch(part):
        return "size"
    return "precision" if part in PRECISIONS else "anchor"


# The scorecard that wanrt was begun with, under its numbers. Run 32 was run 31 with another attention kernel.
SEED_MATRIX = (
    Entry("pp1+tp=4", "decode-all", name="30 pp1+tp=4 decode-all"),
    Entry("pp1+tp=4", "overlap", name="31 pp1+tp=4 overlap"),
    Entry("pp1+tp=4", "overlap", name="32 pp1+tp=4 overlap"),
    Entry("tp=8", "decode-all", name="33 tp=8 decode-all"),
    Entry("pp1+tp=4", "decode-all", True, "34 pp1+tp=4 decode-all compiled"),
    Entry("pp1+tp=5", "decode-all", name="35 pp1+tp=5 decode-all"),
    Entry("single", "decode-all", name="36 single decode-all"),
    Entry("pp1+tp=4", "latent", True, "37 pp1+tp=4 latent compiled"),
)

# A split VAE beside the same mesh without; `table` gives the gain. Of two devices, then three, then four.
VAE_MATRIX = tuple(
    Entry(f"{mesh}{split}")
    for mesh, splits in {
        "tp=2": ("", "+vae=2"),
        "ulysses=2": ("", "+vae=2"),
        "pp1+tp=1": ("", "+vae=2", "+vae=3"),
        "pp1+ulysses=2": ("", "+vae=2"),
        "ulysses=4": ("", "+vae=2", "+vae=4"),
    }.items()
    for split in splits
)

SIZES = ("576x320", "832x480")
# Each in order of importance: the candidates for the fastest first, what they are compared with behind them.
TWO = ("ulysses=2", "tp=2", "ulysses=2+vae=2", "tp=2+vae=2", "pp1+tp=1")
FOUR = ("pp1+ulysses=2", "pp1+tp=2", "ulysses=4", "ulysses=4+vae=4", "pp1+tp=2+vae=2", "tp=4")
EIGHT = (
    "pp1+ulysses=4+vae=4",
    "pp1+ulysses=4",
    "pp1+tp=4+vae=4",
    "pp1+tp=4",
    "ulysses=8",
    "pp1+ulysses=5",
    "tp=8",
)
OTHER_ANCHORS = ("decode-all", "overlap", "latent", "first-frame")


def _machine(topologies: Iterable[str], precisions: Iterable[str]) -> Iterator[Entry]:
    """One device first, from whose costs the others are predicted; then every topology with peer-to-peer, then
    without. Topology by topology, each precision in both sizes.
    """
    measured = [Entry(size=size, precision=precision) for precision in precisions for size in SIZES]
    yield from (replace(entry, topology="single") for entry in measured)
    for p2p in (True, False):
        for topology in topologies:
            yield from (replace(entry, topology=topology, p2p=p2p) for entry in measured)


def _two() -> Iterator[Entry]:
    """fp8 between the entries with peer-to-peer and those without."""
    entries = list(_machine(TWO, ("bf16",)))
    yield from (entry for entry in entries if entry.p2p)
    for topology in ("single", *TWO[:2]):
        yield from (Entry(topology, size=size, precision="fp8") for size in SIZES)
    yield from (entry for entry in entries if not entry.p2p)


def _four() -> Iterator[Entry]:
    """The anchor policies between the entries with peer-to-peer and those without."""
    entries = list(_machine(FOUR, ("bf16", "fp8")))
    yield from (entry for entry in entries if entry.p2p)
    for anchor in OTHER_ANCHORS:
        yield from (Entry("pp1+tp=2", anchor, size=size, precision="bf16") for size in SIZES)
    yield from (entry for entry in entries if not entry.p2p)


MATRICES: Mapping[str, tuple[Entry, ...]] = {
    "seed": SEED_MATRIX,
    "vae": VAE_MATRIX,
    "two": tuple(_two()),
    "four": tuple(_four()),
    "eight": tuple(_machine(EIGHT, ("bf16", "fp8"))),
}


def entries_of(
    anchors: str | None, matrix: str | None, size: str | None = None, precision: str | None = None
) -> tuple[Entry, ...]:
    """What to run: a named matrix, a list of entries, or the anchor policies given.

    size, precision: of a named matrix take the place of its own, once each. Raises `UsageError` for a wrong entry.
    """
    from wanrt.script.job import ANCHORS

    if matrix is not None and matrix in MATRICES:
        fixed = {key: value for key, value in (("size", size), ("precision", precision)) if value is not None}
        kept = dict.fromkeys(fixed)
        narrowed = (replace(entry, **kept) for entry in MATRICES[matrix])  # type: ignore[arg-type]
        # the seed's table has one configuration twice, under two names
        return tuple(dict.fromkeys(narrowed))
    if matrix is not None:
        return tuple(Entry.parse(text) for text in matrix.split(","))
    names = ANCHORS if anchors == "all" else anchors.split(",") if anchors else [None]
    return tuple(Entry(anchor=name) for name in names)
