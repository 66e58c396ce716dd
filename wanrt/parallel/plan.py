"""How a transformer is split, as data: which parameter along which axis.

Tensor parallelism after Shoeybi et al. 2019 (Megatron-LM, arXiv:1909.08053): queries, keys, values and the
first half of the feed-forward are split by output (whole heads), the projections back by input, and one
all-reduce follows each of those, or what `fused_exchange` has in its place. Everything else is whole on every rank,
and so are all weights under Ulysses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from wanrt.parallel.topology import MeshKind, Topology

Index = tuple[slice, ...]
Slicer = Callable[[str, tuple[int, ...]], Index | None]


class Style(StrEnum):
    """What becomes of a module whose parameters are split."""

    COLUMN = "column"  # by output: the module stays as it is, only smaller
    ROW = "row"  # by input: partial products are summed over the ranks, then the whole bias is added
    NORM = "norm"  # over all heads: only the weight is cut, `tensor.spread_rope_norm` sums the squares


@dataclass(frozen=True)
class Split:
    """One rule: modules whose dotted name matches `modules` (regular expression), their parameters' axes.

    weight, bias: the axis to cut, None to keep the parameter whole.
    """

    modules: str
    style: Style
    weight: int
    bias: int | None


TENSOR_PARALLEL = (
    Split(r"blocks\.\d+\.(self_attn|cross_attn)\.[qkv]", Style.COLUMN, weight=0, bias=0),
    Split(r"blocks\.\d+\.(self_attn|cross_attn)\.norm_[qk]", Style.NORM, weight=0, bias=None),
    Split(r"blocks\.\d+\.(self_attn|cross_attn)\.o", Style.ROW, weight=1, bias=None),
    Split(r"blocks\.\d+\.ffn\.0", Style.COLUMN, weight=0, bias=0),
    Split(r"blocks\.\d+\.ffn\.2", Style.ROW, weight=1, bias=None),
)


@dataclass(frozen=True)
class ShardPlan:
    """The splits of one mesh of `size` ranks."""

    kind: MeshKind
    size: int
    splits: tuple[Split, ...]

    @classmethod
    def of(cls, topology: Topology) -> ShardPlan:
        """The plan of a topology's mesh. One rank has nobody to exchange with: its model stays as it is.

        Split in one, it would read q and k once more for their squares, and sum over itself.
        """
        if topology.mesh == 1:
            return cls(MeshKind.SINGLE, 1, ())
        return cls(topology.kind, topology.mesh, TENSOR_PARALLEL if topology.kind is MeshKind.TP else ())

    def rule(self, module: str) -> Split | None:
        """The rule for a module's dotted name."""
        return next((split for split in self.splits if re.fullmatch(split.modules, module)), None)

    def axis(self, parameter: str) -> int | None:
        """The axis along which a parameter is cut; None: it is whole on every rank."""
        module, _, leaf = parameter.rpartition(".")
        split = self.rule(module)
        return None if split is None else split.weight if leaf == "weight" else split.bias

    def slicer(self, rank: int) -> Slicer:
        """What rank `rank` reads of a parameter: (name, full shape) -> one slice per axis, None for all of it."""

        def index(name: str, shape: tuple[int, ...]) -> Index | None:
            axis = self.axis(name)
            if axis is None or self.size == 1:
                return None
            part = shape[axis] // self.size
            return tuple(
                slice(rank * part, (rank + 1) * part) if i == axis else slice(None) for i in range(len(shape))
            )

        return index

    def local_heads(self, heads: int) -> int:
        """Heads that a rank attends with, and whose keys and values its cache holds."""
        return heads // self.size
