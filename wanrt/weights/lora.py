"""LoRA adapters, merged into the weights they belong to while these are read.

W' = W + alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685). Both public spellings are read: PEFT's
`lora_A`/`lora_B` and `lora_down`/`lora_up`. Without an alpha in the file the factor is 1: LongLive trains with
alpha = rank (NVlabs/LongLive configs/longlive_inference.yaml at 0911b03).
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wanrt.errors import WeightsError
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.names import Naming, to_original, unwrap_names
from wanrt.weights.sources import Index, TensorSource, open_source

logger = logging.getLogger("wanrt.weights")

# Self-Forcing style checkpoints name the adapter `generator_lora` (NVlabs/LongLive inference.py at 0911b03).
LORA_ENTRIES = ("generator_lora", "lora", "state_dict", "model")
# ... and train it on the plain generator, not on the EMA (use_ema: false in the same configuration).
BASE_ENTRIES = ("generator", "generator_ema", "model", "state_dict")

MERGED = "wanrt_merged_lora"  # metadata key: name of the LoRA file that a safetensors file was merged with

_PART = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?$")
_SAME_AS = {"lora_down": "lora_A", "lora_up": "lora_B"}


@dataclass(frozen=True)
class _Adapter:
    """One layer's adapter: names of A [rank, in], B [out, rank] and perhaps alpha [] in the LoRA file."""

    a: str
    b: str
    alpha: str | None


def merge_lora(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """The checkpoint with a LoRA added to its weights, computed in fp32 when a tensor is read.

    A checkpoint that `wanrt weights convert --lora` wrote says so in its metadata and is returned as it is.

    Raises WeightsError when the file is no LoRA or belongs to other layers or sizes.
    """
    merged = checkpoint.source.metadata().get(MERGED)
    if merged:
        logger.warning("%s: already merged with %s; %s is not merged again", checkpoint.path, merged, path)
        return checkpoint
    lora = open_source(path, LORA_ENTRIES)
    adapters = _read_adapters(lora, checkpoint)
    logger.info("%s: merging a LoRA for %d layers from %s", checkpoint.path, len(adapters), path)
    stored = {checkpoint.names[f"{layer}.weight"]: adapter for layer, adapter in adapters.items()}
    return replace(checkpoint, source=_MergedSource(checkpoint.source, lora, stored))


def _read_adapters(lora: TensorSource, base: Checkpoint) -> dict[str, _Adapter]:
    """Layer (original name) -> its adapter."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for short, stored in unwrap_names(lora.names()).items():
        found = _PART.search(short)
        if found is None:
            raise WeightsError(
                f"{lora.path}: {short} is no part of a LoRA; expected lora_A and lora_B of layers"
            )
        parts[short[: found.start()]][_SAME_AS.get(found[1], found[1])] = stored
    layers = _original_layers(list(parts), base)
    return {
        layers[layer]: _check_adapter(layer, layers[layer], part, lora, base) for layer, part in parts.items()
    }


def _original_layers(layers: list[str], base: Checkpoint) -> dict[str, str]:
    """Layer in the LoRA -> layer under original names; a LoRA may follow either naming scheme."""
    weights = [f"{layer}.weight" for layer in layers]
    diffusers = any(".attn1." in name or ".attn2." in name or ".ffn.net." in name for name in weights)
    naming = Naming.DIFFUSERS if diffusers else Naming.ORIGINAL
    original = to_original(weights, base.kind, naming)
    return {name.removesuffix(".weight"): key.removesuffix(".weight") for key, name in original.items()}


def _check_adapter(
    layer: str, original: str, part: Mapping[str, str], lora: TensorSource, base: Checkpoint
) -> _Adapter:
    name = f"{original}.weight"
    if name not in base.names:
        raise WeightsError(f"{lora.path}: {layer} is no layer of {base.path} ({base.describe()})")
    if not {"lora_A", "lora_B"} <= part.keys():
        raise WeightsError(f"{lora.path}: {layer} has {sorted(part)}; expected lora_A and lora_B")
    adapter = _Adapter(part["lora_A"], part["lora_B"], part.get("alpha"))
    (rank, width), (height, rank_b) = lora.shape(adapter.a), lora.shape(adapter.b)
    shape = base.source.shape(base.names[name])
    if rank != rank_b or (height, width) != shape:
        raise WeightsError(
            f"{lora.path}: {layer} is a rank {rank} x {rank_b} update of {[height, width]};"
            f" {base.path.name} has {list(shape)} there"
        )
    return adapter


class _MergedSource(TensorSource):
    """A source whose adapted tensors are merged as they are read."""

    def __init__(self, base: TensorSource, lora: TensorSource, adapters: Mapping[str, _Adapter]) -> None:
        self.path = base.path
        self._base = base
        self._lora = lora
        self._adapters = adapters

    def names(self) -> Sequence[str]:
        """See TensorSource."""
        return self._base.names()

    def metadata(self) -> Mapping[str, str]:
        """See TensorSource; says that a LoRA is merged in."""
        return {**self._base.metadata(), MERGED: self._lora.path.name}

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """See TensorSource: merged tensors are fp32, rounded once by who reads them."""
        return torch.float32 if name in self._adapters else self._base.dtype(name)

    def read(self, name: str, index: Index | None = None, *, pinned: bool = False) -> Tensor:
        """See TensorSource. A slice multiplies only the rows of B and columns of A that it needs."""
        weight = self._base.read(name, index, pinned=pinned)
        adapter = self._adapters.get(name)
        if adapter is None:
            return weight
        rows, columns = index or (slice(None), slice(None))
        a, b = self._lora.read(adapter.a).float(), self._lora.read(adapter.b).float()
        return torch.addmm(weight.float(), b[rows], a[:, columns], alpha=self._factor(adapter, len(a)))

    def _factor(self, adapter: _Adapter, rank: int) -> float:
        return float(self._lora.read(adapter.alpha)) / rank if adapter.alpha else 1.0
