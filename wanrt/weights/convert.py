"""Checkpoints rewritten: other names, other dtype, a LoRA merged in, one safetensors file or shards.

Tensors pass through one at a time, so a 28 GB model needs memory for its largest tensor only. The file format is that
of huggingface/safetensors (README.md, "Format"): 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from wanrt.errors import OutputError, WeightsError
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.loading import is_finite
from wanrt.weights.names import Kind, Naming, from_original, other_naming

SHARD_BYTES = 5_000_000_000  # as Hugging Face libraries shard by default
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_STEMS = {Naming.DIFFUSERS: "diffusion_pytorch_model"}  # the file names that diffusers looks for


@dataclass(frozen=True)
class _Entry:
    """One tensor of the output."""

    name: str
    original: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert(
    checkpoint: Checkpoint,
    target: Path,
    *,
    naming: Naming | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Path:
    """Rewrite a checkpoint as safetensors and return the file, or the index of its shards.

    Args:
        checkpoint: what to rewrite.
        target: a file (its name ends in .safetensors), or a directory, where more than `shard_bytes` are sharded.
        naming: names of the tensors; None keeps the scheme of the source.
        dtype: None keeps each tensor's own.
        force: overwrite.

    Raises:
        WeightsError: unknown tensors, a naming that the kind does not have, NaN or Inf.
        OutputError: the target exists, or cannot be written.
    """
    entries = _entries(checkpoint, naming or checkpoint.naming, dtype)
    metadata = {**checkpoint.source.metadata(), "format": "pt"}
    if target.suffix == ".safetensors":
        _refuse_overwrite([target], force)
        _write(target, entries, checkpoint, metadata)
        return target
    if target.suffix:
        raise OutputError(f"{target}: expected a name that ends in .safetensors, or a directory")
    stem = _STEMS.get(naming or checkpoint.naming, "model")
    return _write_shards(target, stem, _shards(entries, shard_bytes), checkpoint, metadata, force)


def _entries(checkpoint: Checkpoint, naming: Naming, dtype: torch.dtype | None) -> list[_Entry]:
    if checkpoint.kind in (Kind.UNKNOWN, Kind.LORA):
        raise WeightsError(
            f"{checkpoint.path}: got {checkpoint.describe()}; expected a model of the Wan family"
        )
    if naming not in (Naming.ORIGINAL, other_naming(checkpoint.kind)):
        known = ", ".join(filter(None, (Naming.ORIGINAL, other_naming(checkpoint.kind))))
        raise WeightsError(f"{checkpoint.path}: a {checkpoint.kind} has no {naming} names; expected {known}")
    try:
        names = from_original(checkpoint.names, checkpoint.kind, naming)
    except KeyError as error:
        raise WeightsError(
            f"{checkpoint.path}: {error.args[0]}; the file has tensors of something else"
        ) from error
    shapes = checkpoint.shapes()
    return [
        _Entry(name, original, shapes[original], dtype or checkpoint.source.dtype(checkpoint.names[original]))
        for original, name in names.items()
    ]


def _shards(entries: Iterable[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[_Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _write_shards(
    directory: Path,
    stem: str,
    shards: list[list[_Entry]],
    checkpoint: Checkpoint,
    metadata: Mapping[str, str],
    force: bool,
) -> Path:
    count = len(shards)
    files = [directory / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [directory / f"{stem}.safetensors"]
    index = directory / f"{stem}.safetensors.index.json"
    _refuse_overwrite([*files, *([index] if count > 1 else [])], force)
    _make_directory(directory)
    for file, shard in zip(files, shards, strict=True):
        _write(file, shard, checkpoint, metadata)
    if count == 1:
        return files[0]
    home = {entry.name: file.name for file, shard in zip(files, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}
    index.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return index


def _write(path: Path, entries: list[_Entry], checkpoint: Checkpoint, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file under a temporary name, then give it its own."""
    partial = path.with_name(path.name + ".part")
    _make_directory(path.parent)
    try:
        with partial.open("wb") as file:
            file.write(_header(entries, metadata))
            for entry in entries:
                _write_tensor(file, checkpoint.read(entry.original).to(entry.dtype), entry, checkpoint)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _header(entries: list[_Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header, padded with spaces so that the data begins at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        if entry.dtype not in _CODES:
            raise WeightsError(f"{entry.name} is {entry.dtype}; expected floating-point weights")
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: Tensor, entry: _Entry, checkpoint: Checkpoint) -> None:
    if entry.dtype.itemsize > 1 and not is_finite(tensor):
        raise WeightsError(f"{checkpoint.path}: NaN or Inf in {entry.original} as {entry.dtype}")
    flat = tensor.contiguous().flatten()
    file.write(flat.view(torch.uint8).numpy().data)


def _refuse_overwrite(paths: Iterable[Path], force: bool) -> None:
    for path in paths:
        if path.exists() and not force:
            raise OutputError(f"{path}: exists; --force overwrites it")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror})") from error
