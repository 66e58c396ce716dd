"""Which devices do what: `single`, `tp=N`, `ulysses=N`, `pp1+tp=N`, `pp1+ulysses=N`, each with `+vae=M`.

A topology is parsed without knowing the model; `check` then refuses it with the equation that fails and the
nearest topology that works. Ranks are numbered as torch.distributed sees them: stage 0 is rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from wanrt.errors import UsageError

GRAMMAR = re.compile(r"(?:(pp1)\+)?(?:single|(tp|ulysses)=([1-9]\d{0,2}))(?:\+vae=([1-9]\d{0,2}))?")
FORMS = "single, tp=N, ulysses=N, pp1+tp=N or pp1+ulysses=N, each also with +vae=M, or auto"
MAX_MESH = 64  # how far the search for the nearest valid N goes


class MeshKind(StrEnum):
    """How one transformer is spread over several devices."""

    SINGLE = "single"
    TP = "tp"  # tensor parallel: weights and heads split, activations whole
    ULYSSES = "ulysses"  # sequence parallel: tokens split, weights whole; heads split inside attention


@dataclass(frozen=True)
class Rank:
    """One process: its number, its device's index, the mesh's rank it plays, and its roles.

    mesh and vae are positions in those groups, None outside of them.
    """

    rank: int
    name: str
    mesh: int | None
    vae: int | None
    stage0: bool

    @property
    def roles(self) -> str:
        """`stage 0, VAE part 1 of ...` in words."""
        parts = ["stage 0"] if self.stage0 else []
        if self.mesh is not None:
            parts.append(f"mesh {self.mesh}")
        if self.vae is not None:
            parts.append(f"VAE part {self.vae}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Topology:
    """A mesh of `mesh` devices, `pp1`: stage 0 beside it on devices of its own, the VAE on `vae` devices."""

    kind: MeshKind = MeshKind.SINGLE
    mesh: int = 1
    pp1: bool = False
    vae: int = 1

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read a topology. Raises `UsageError` for anything but the forms of the module's head; `auto` is
        resolved by `wanrt.parallel.choose` before.
        """
        match = GRAMMAR.fullmatch(text.strip())
        if match is None or (match[1] and match[2] is None) or (match[2] is None and match[4]):
            raise UsageError(f"topology {text!r}: expected {FORMS}")
        pp1, kind, mesh, vae = match.groups()
        return cls(MeshKind(kind or "single"), int(mesh or 1), bool(pp1), int(vae or 1))

    def __str__(self) -> str:
        body = "single" if self.kind is MeshKind.SINGLE else f"{self.kind}={self.mesh}"
        return ("pp1+" if self.pp1 else "") + body + (f"+vae={self.vae}" if self.vae > 1 else "")

    @property
    def stage0_devices(self) -> int:
        """Devices that only stage 0 uses."""
        return self.vae if self.pp1 else 0

    @property
    def devices(self) -> int:
        """Devices, and processes, in all."""
        return self.stage0_devices + self.mesh

    @property
    def equation(self) -> str:
        """`1 + 4 = 5 devices`, or `4 devices`."""
        if self.pp1:
            return f"{self.vae} + {self.mesh} = {self.devices} devices"
        return "1 device" if self.mesh == 1 else f"{self.mesh} devices"

    @property
    def distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.devices > 1

    def ranks(self) -> tuple[Rank, ...]:
        """Who does what. Under PP1 the mesh follows stage 0's devices; without it the two share."""
        return tuple(self._rank(i) for i in range(self.devices))

    def _rank(self, rank: int) -> Rank:
        mesh = rank - self.stage0_devices
        vae = rank if rank < self.vae else None
        name = "stage0" if rank == 0 else f"mesh{mesh}" if mesh >= 0 else f"vae{rank}"
        return Rank(rank, name, mesh if mesh >= 0 else None, vae, rank == 0)


@dataclass(frozen=True)
class ModelShape:
    """The whole numbers of a run that a split must divide.

    heads, ffn_dim: of the transformer. frame_tokens: tokens of a latent frame, (H/16)(W/16). vae_lines: rows or
    columns of a latent, of which a split VAE needs one a rank; None: not asked.
    """

    heads: int
    ffn_dim: int
    frame_tokens: int
    vae_lines: int | None = None


@dataclass(frozen=True)
class Equation:
    """A division that must come out even."""

    whole: int
    part: int
    what: str

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.whole % self.part == 0

    def __str__(self) -> str:
        return f"{self.whole} % {self.part} = {self.whole % self.part} ({self.what})"


def equations(topology: Topology, shape: ModelShape) -> tuple[Equation, ...]:
    """Every division that `topology` asks of the model.

    Ulysses splits the tokens inside each latent frame, so that a pass over any number of frames divides, and
    every rank's share of every frame sees that frame's own timestep.
    """
    n = topology.mesh
    if topology.kind is MeshKind.TP:
        return Equation(shape.heads, n, "heads"), Equation(shape.ffn_dim, n, "ffn_dim")
    if topology.kind is MeshKind.ULYSSES:
        frame = Equation(shape.frame_tokens, n, "tokens of a latent frame")
        return Equation(shape.heads, n, "heads"), frame
    return ()


def check(topology: Topology, shape: ModelShape, devices: int | None = None) -> None:
    """Refuse a topology that the model or the machine cannot take.

    devices: how many there are; None: not asked (`wanrt plan` for another machine, CPU ranks).

    Raises `UsageError` with the failed equation and the nearest topologies that work.
    """
    reason = why_not(topology, shape, devices)
    if reason is None:
        return
    options = [str(option) for option in nearest(topology, shape, devices)]
    advice = f"nearest valid: {' or '.join(options)}" if options else "use --topology single"
    raise UsageError(f"topology {topology}: {reason}; {advice}")


def why_not(topology: Topology, shape: ModelShape, devices: int | None = None) -> str | None:
    """The first reason against `topology`, or None."""
    for equation in equations(topology, shape):
        if not equation.holds:
            return f"{equation}, expected 0"
    if not topology.pp1 and topology.vae > topology.mesh:
        return f"vae={topology.vae} > {topology.mesh}, the mesh's devices, which the VAE shares without pp1"
    if shape.vae_lines is not None and topology.vae > shape.vae_lines:
        return f"vae={topology.vae} > {shape.vae_lines}, the longer side of a latent"
    if devices is not None and topology.devices > devices:
        return f"{topology.equation} > {devices} on this machine"
    return None


def nearest(topology: Topology, shape: ModelShape, devices: int | None = None) -> list[Topology]:
    """Valid topologies close to a refused one: the same kind with another N, the other kind with the same N.

    A VAE split that does not fit is made smaller first.
    """

    def fits(option: Topology) -> bool:
        return option != topology and why_not(option, shape, devices) is None

    found = [_closest(_smaller_vae(topology), topology.vae, lambda t: t.vae, fits)]
    if found == [None]:
        found = [
            _closest(_other_meshes(topology, k), topology.mesh, lambda t: t.mesh, fits)
            for k in _kinds(topology)
        ]
    options = [Topology() if option.devices == 1 else option for option in found if option is not None]
    same_kind, same_mesh = options[:1], [o for o in options[1:] if o.mesh == topology.mesh]
    return same_kind + same_mesh


def _kinds(topology: Topology) -> list[MeshKind]:
    return [topology.kind, *(k for k in (MeshKind.TP, MeshKind.ULYSSES) if k is not topology.kind)]


def _smaller_vae(topology: Topology) -> Iterator[Topology]:
    return (replace(topology, vae=m) for m in range(1, topology.vae))


def _other_meshes(topology: Topology, kind: MeshKind) -> Iterator[Topology]:
    for n in range(1, MAX_MESH + 1):
        vae = topology.vae if topology.pp1 else min(topology.vae, n)
        yield Topology(kind, n, topology.pp1, vae)
        if topology.pp1 and vae > 1:
            yield Topology(kind, n, True, 1)


def _closest(
    options: Iterator[Topology],
    wanted: int,
    number: Callable[[Topology], int],
    fits: Callable[[Topology], bool],
) -> Topology | None:
    """The option whose number is nearest to `wanted`, the smaller one of two, the larger VAE of those."""
    return min(
        filter(fits, options), key=lambda t: (abs(number(t) - wanted), number(t), -t.vae), default=None
    )
