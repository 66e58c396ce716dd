"""Where tensors come from: safetensors (one file, or shards with an index), torch pickles, nothing at all.

A `TensorSource` knows names, shapes and dtypes without reading data, and reads one tensor, or a slice of one, when
asked. What a file is, is decided by its first bytes, never by its name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanrt.errors import WeightsError
from wanrt.weights.files import find_checkpoints, one_line, read_index

logger = logging.getLogger("wanrt.weights")

Index = tuple[slice, ...]

SCRATCH = 4 << 20  # bytes of lines that parts are cut from at a time: memory that stays warm
PINNED = 128 << 20  # bytes of the largest part in page-locked memory, which PyTorch keeps; 14B has one larger

# Entries of a training checkpoint that hold the model, best first. Self-Forcing's README samples with the EMA
# weights (guandeh17/Self-Forcing README.md at 33593df), so they win where a file has both.
MODEL_ENTRIES = ("generator_ema", "generator", "model_ema", "model", "state_dict", "module")

# The dtypes of safetensors' header (safetensors `Dtype`) that weights come in.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSource(ABC):
    """Named tensors that are read on demand."""

    path: Path

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All tensor names, as the file has them."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Reads no data; raises KeyError for a name that is not there."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, as stored."""

    @abstractmethod
    def read(self, name: str, index: Index | None = None, *, pinned: bool = False) -> Tensor:
        """The tensor on the CPU in its stored dtype, or the part of it that `index` (one slice per axis) selects.

        Without `index` the tensor is a view of the memory-mapped file where that is possible: treat it as read-only.
        With one, no more of the file is read than its lines along the first axis, each whole; `pinned`: into
        page-locked memory where that is possible, up to `PINNED`, for a part on its way to a GPU. PyTorch uses such
        memory again, and new pages cost more than what is read into them: with the way up 6.6 GB/s of a cached file
        instead of 1.2 (H100, PyTorch 2.11).
        """

    def metadata(self) -> Mapping[str, str]:
        """Free text that the file carries about itself."""
        return {}


class SafetensorsSource(TensorSource):
    """One memory-mapped safetensors file; parts of tensors are read beside the mapping.

    A mapping reads ahead, on some systems 8 MiB at every first touch: a rank that takes a part of each tensor would
    have read the whole file.
    """

    def __init__(self, path: Path) -> None:
        """Raises WeightsError when the header is damaged or promises more bytes than the file has."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self._names = dict.fromkeys(self._file.keys())
            self._lines: LineReader | None = None
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{path}: damaged safetensors file ({one_line(error)}); fetch it again"
            ) from error

    def names(self) -> Sequence[str]:
        """See TensorSource."""
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """See TensorSource. Raises WeightsError for a dtype that torch does not know."""
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise WeightsError(f"{self.path}: {name} has dtype {code}; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[code]

    def read(self, name: str, index: Index | None = None, *, pinned: bool = False) -> Tensor:
        """See TensorSource."""
        if index is None:
            return self._whole(name)
        if self._lines is None:
            self._lines = LineReader(self.path)
        return self._lines.read(name, self.shape(name), self.dtype(name), index, pinned)

    def metadata(self) -> Mapping[str, str]:
        """See TensorSource."""
        return self._file.metadata() or {}

    def _whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def _slice(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_slice(name)


class LineReader:
    """Reads lines of tensors along their first axis out of a safetensors file, and nothing around them.

    A part along another axis is cut from its lines whole: those of several ranks share the disk's pages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        header = json.loads(os.pread(self._descriptor, length, 8))
        self._begin = {
            name: 8 + length + about["data_offsets"][0]
            for name, about in header.items()
            if name != "__metadata__"
        }

    def read(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, index: Index, pinned: bool = False
    ) -> Tensor:
        """The part `index` of a tensor of this shape and dtype. Raises WeightsError when the file ends first."""
        part_shape = sliced_shape(shape, index)
        pinned = pinned and math.prod(part_shape) * dtype.itemsize <= PINNED
        part = torch.empty(part_shape, dtype=dtype, pin_memory=pinned)
        if not part.numel():
            return part
        first, step = (index[0].indices(shape[0])[::2]) if shape else (0, 1)
        whole_lines = step == 1 and part.shape[1:] == shape[1:]
        if whole_lines:
            self._fill(part, name, first * math.prod(shape[1:]))
            return part
        line = math.prod(shape[1:])
        block = max(1, SCRATCH // (line * dtype.itemsize))
        scratch = self._scratch_of((min(block, len(part)), *shape[1:]), dtype)
        for done in range(0, len(part), block):
            here = part[done : done + block]
            lines = scratch[: len(here)]
            if step == 1:
                self._fill(lines, name, (first + done) * line)
            else:
                for i in range(len(here)):
                    self._fill(lines[i], name, (first + (done + i) * step) * line)
            here.copy_(lines[(slice(None), *index[1:])])
        return part

    def _scratch_of(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for lines, the same every time."""
        size = math.prod(shape) * dtype.itemsize
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size].view(dtype).view(shape)

    def _fill(self, tensor: Tensor, name: str, skipped: int) -> None:
        """Reads a contiguous tensor's values, `skipped` of them after the stored one's first."""
        room = tensor.reshape(-1).view(torch.uint8).numpy().data
        at = self._begin[name] + skipped * tensor.dtype.itemsize
        while room.nbytes:
            got = os.preadv(self._descriptor, [room], at)
            if got == 0:
                raise WeightsError(f"{self._path}: ends inside {name}; fetch it again")
            room, at = room[got:], at + got


def sliced_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """Shape of the part `index` of a tensor."""
    return tuple(len(range(*part.indices(size))) for size, part in zip(shape, index, strict=True))


class ShardedSource(TensorSource):
    """Safetensors shards behind a Hugging Face index (`*.safetensors.index.json`)."""

    def __init__(self, index_path: Path) -> None:
        """Raises WeightsError for a damaged index, a shard that is missing, or a tensor that its shard lacks."""
        self.path = index_path
        self._home = read_index(index_path)
        shards = sorted(set(self._home.values()))
        missing = [shard for shard in shards if not (index_path.parent / shard).is_file()]
        if missing:
            raise WeightsError(
                f"{index_path}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]};"
                " fetch them into the same directory"
            )
        self._shards = {shard: SafetensorsSource(index_path.parent / shard) for shard in shards}
        for shard, source in self._shards.items():
            wanted = {name for name, home in self._home.items() if home == shard}
            if absent := wanted.difference(source.names()):
                raise WeightsError(
                    f"{source.path}: lacks {len(absent)} tensors that {index_path.name} promises,"
                    f" first {min(absent)}; fetch the shard again"
                )

    def names(self) -> Sequence[str]:
        """See TensorSource."""
        return tuple(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._shards[self._home[name]].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """See TensorSource."""
        return self._shards[self._home[name]].dtype(name)

    def read(self, name: str, index: Index | None = None, *, pinned: bool = False) -> Tensor:
        """See TensorSource."""
        return self._shards[self._home[name]].read(name, index, pinned=pinned)


class TensorsSource(TensorSource):
    """Tensors already in memory, or memory-mapped by torch: a pickle, or what a test made."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.path = path
        self._tensors = tensors

    def names(self) -> Sequence[str]:
        """See TensorSource."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """See TensorSource."""
        return self._tensors[name].dtype

    def read(self, name: str, index: Index | None = None, *, pinned: bool = False) -> Tensor:
        """See TensorSource."""
        tensor = self._tensors[name].detach()
        return tensor if index is None else tensor[index]


def open_source(path: str | Path, entries: Sequence[str] = MODEL_ENTRIES) -> TensorSource:
    """Open a checkpoint: a safetensors file, an index, a torch pickle, or a directory that holds one of them.

    Of a pickled training checkpoint the first of `entries` that is there is taken. Raises WeightsError, in one
    line, for everything else.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; expected a checkpoint (.safetensors, .index.json, .pt, .pth)"
        )
    head = _first_bytes(path)
    # First, because the header length that a safetensors file begins with may look like a pickle's first byte.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return SafetensorsSource(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _open_pickle(path, entries, mapped=head.startswith(b"PK"))
    if head.lstrip().startswith(b"{"):
        return ShardedSource(path)
    raise WeightsError(f"{path}: {_name_foreign(path, head)}; expected safetensors or a torch checkpoint")


def _only_checkpoint(directory: Path) -> Path:
    found = find_checkpoints(directory)
    if len(found) == 1:
        return found[0]
    got = ", ".join(path.name for path in found[:4]) or "none"
    raise WeightsError(
        f"{directory}: a directory with {len(found)} checkpoints ({got}); name the file itself"
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error


def _name_foreign(path: Path, head: bytes) -> str:
    """What a file is that is no checkpoint; the usual accidents have names."""
    if path.stat().st_size == 0:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if head.lstrip()[:1] == b"<":
        return "a web page (a failed download?)"
    if head.startswith(b"GGUF"):
        return "a GGUF file, which wanrt does not read"
    if head[8:9] == b"{":
        return "a truncated safetensors file (fetch it again)"
    return "not a checkpoint"


def _open_pickle(path: Path, entries: Sequence[str], *, mapped: bool) -> TensorSource:
    """Open a torch checkpoint without running its code. The old, un-zipped format cannot be memory-mapped."""
    if not mapped:
        logger.info("%s: old torch format, read into memory instead of mapped", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: the errors below say more, in one line
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, error)) from error
    except (
        Exception
    ) as error:  # zipfile, struct, EOF, RuntimeError, unicode...: a damaged file fails anywhere
        raise WeightsError(f"{path}: damaged torch checkpoint ({one_line(error)}); fetch it again") from error
    return TensorsSource(_pick_entry(content, entries, path), path)


def _refusal(path: Path, error: Exception) -> str:
    """One line about a pickle that wants more than tensors."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"Unsupported global: (\S+)", str(error))
    # without the name, torch's message is advice to load the file unchecked
    what = f"it would run {wanted[1]}" if wanted else "its format is older than checked loading"
    return f"{path}: refused, this pickle holds more than tensors ({what}); expected a plain state dict"


def _pick_entry(content: Any, entries: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, which may be nested."""
    if isinstance(content, Mapping):
        found = next((entry for entry in entries if isinstance(content.get(entry), Mapping)), None)
        if found:
            logger.info("%s: took entry %r of %s", path, found, sorted(map(str, content))[:8])
            return _pick_entry(content[found], entries, path)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors and len(tensors) == len(content) and all(isinstance(key, str) for key in tensors):
            return tensors
    raise WeightsError(f"{path}: holds no state dict (tensor names -> tensors) but {_describe(content)}")


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with keys {sorted(map(str, content))[:8]}"
    return f"a {type(content).__name__}"
