"""How many bytes run between matrix products: what the plain operators move, and what has to move at least.

Every operator of a pass is watched. Its *level* is the number of matrix products, attentions and convolutions on the
longest way to it from the inputs. Between two levels no fusion can keep anything on the chip; within one level a
perfect compiler would read every input once and write every result that a later level (or the caller) wants once.
That is what has to move. What does move is every operator's inputs and outputs, once each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanrt.models.memory import Elementwise
from wanrt.probes.compile_kernels import FUSIBLE, Work, cpu_work


@dataclass(frozen=True)
class Traffic:
    """One pass between its matrix products. Bytes; operators that compute or copy, views not counted."""

    operators: int
    moved: int
    needed: int


@dataclass
class _Use:
    """A storage's bytes that one operator or one level touches: distinct views, at most the whole storage."""

    whole: int
    views: dict[tuple[Any, ...], int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return min(self.whole, sum(self.views.values()))


Uses = dict[int, _Use]


@dataclass(frozen=True)
class _Operator:
    work: Work
    level: int
    reads: Uses
    writes: Uses


class TrafficTrace(TorchDispatchMode):
    """Watches operators while it is entered; run the pass under `torch.no_grad`, not under inference mode, in which
    composite operators arrive whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operators: list[_Operator] = []
        self._levels: dict[int, int] = {}  # of a storage: the level at which it can be read
        self._storages: dict[int, StorageWeakRef] = {}  # kept, so that no address is given out twice
        self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operator and takes note of it."""
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            self._note(func, args, kwargs or {}, out)
        return out

    def elementwise(self, ops: Elementwise) -> Elementwise:
        """`ops` with each call watched as one operator, whatever kernels it launches."""
        return replace(ops, add_norm=self._watched(ops.add_norm), rope_norm=self._watched(ops.rope_norm))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._paused = True
            try:
                out = call(*args, **kwargs)
            finally:
                self._paused = False
            reads = _tensors((args, {k: v for k, v in kwargs.items() if k != "out"}))
            given = {id(t) for t in reads}  # add_norm hands its x through where there is nothing to add
            self._add(Work.ELEMENTWISE, reads, [t for t in _tensors(out) if id(t) not in given])
            return out

        return run

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        schema = func._schema
        work = cpu_work(schema.name)
        if func.is_view or (work is None and not _computes(func)):
            return
        read: list[Tensor] = []
        written = _tensors(out)
        for index, argument in enumerate(schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            target = argument.alias_info is not None and argument.alias_info.is_write
            overwritten = target and (argument.is_out or schema.name in ("aten::copy_", "aten::fill_"))
            read += [] if overwritten else _tensors(value)
            written += _tensors(value) if target else []
        self._add(work or Work.COPY, read, written)

    def _add(self, work: Work, read: list[Tensor], written: list[Tensor]) -> None:
        reads, writes = self._uses(read), self._uses(written)
        level = max((self._levels.get(key, 0) for key in reads), default=0)
        self._operators.append(_Operator(work, level, reads, writes))
        after = level if work in FUSIBLE else level + 1
        for key in writes:
            self._levels[key] = max(after, self._levels.get(key, 0))

    def _uses(self, tensors: Iterable[Tensor]) -> Uses:
        uses: Uses = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self._storages.setdefault(reference.cdata, reference)
            use = uses.setdefault(reference.cdata, _Use(storage.nbytes()))
            view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            use.views[view] = _distinct(tensor)
        return uses

    def result(self) -> Traffic:
        """What was seen so far."""
        mine = [op for op in self._operators if op.work in FUSIBLE]
        moved = sum(use.size for op in mine for use in (*op.reads.values(), *op.writes.values()))
        return Traffic(len(mine), moved, sum(self._needed(level) for level in {op.level for op in mine}))

    def _needed(self, level: int) -> int:
        """Bytes that one level reads from before it, and writes for those after it."""
        reads: Uses = {}
        writes: Uses = {}
        for op in self._operators:
            if op.level == level and op.work in FUSIBLE:
                _merge(reads, {key: use for key, use in op.reads.items() if key not in writes})
                _merge(writes, op.writes)
        kept = self._read_elsewhere(level)
        wanted = [use for key, use in writes.items() if kept.get(key, True)]
        return sum(use.size for use in (*reads.values(), *wanted))

    def _read_elsewhere(self, level: int) -> dict[int, bool]:
        """Of every storage that is read at all: whether anything but this level's fusible operators reads it."""
        kept: dict[int, bool] = {}
        for op in self._operators:
            inside = op.level == level and op.work in FUSIBLE
            for key in op.reads:
                kept[key] = kept.get(key, False) or not inside
        return kept


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _distinct(tensor: Tensor) -> int:
    """Bytes of a view without those that it repeats (stride 0)."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def _merge(into: Uses, uses: Uses) -> None:
    for key, use in uses.items():
        into.setdefault(key, _Use(use.whole)).views.update(use.views)


def _computes(func: Any) -> bool:
    """Operators that `cpu_work` calls the host's because another one does their work, but which arrive whole here."""
    return func._schema.name in ("aten::_to_copy", "aten::clone", "aten::stack")


def trace_pass(run: Callable[[], Any], trace: TrafficTrace) -> Traffic:
    """Run a pass once, watched."""
    with torch.no_grad(), trace:
        run()
    return trace.result()
