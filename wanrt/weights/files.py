"""Checkpoint files on disk, told apart without opening them for their tensors (and without torch)."""

from __future__ import annotations

import json
from pathlib import Path

from wanrt.errors import WeightsError

PATTERNS = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt")


def find_checkpoints(directory: Path) -> list[Path]:
    """Files of a directory that may be checkpoints: indexes, files without one, no shard of an index."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    shards = {shard for index in indexes for shard in _shards_of(index)}
    single = [
        path
        for pattern in PATTERNS
        for path in sorted(directory.glob(pattern))
        if path.name not in shards and path.is_file()
    ]
    return indexes + single


def _shards_of(index: Path) -> set[str]:
    try:
        return set(read_index(index).values())
    except WeightsError:
        return set()  # a damaged index hides no file; opening it says what is wrong


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name. Shards must lie beside the index: a path elsewhere is refused."""
    try:
        home = json.loads(path.read_text("utf-8"))["weight_map"]
        well_formed = isinstance(home, dict) and home and all(isinstance(v, str) for v in home.values())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path}: not a safetensors index ({one_line(error)})") from error
    if not well_formed:
        raise WeightsError(f"{path}: not a safetensors index; expected weight_map: tensor name -> shard file")
    outside = [shard for shard in home.values() if shard != Path(shard).name or shard in ("", ".", "..")]
    if outside:
        raise WeightsError(
            f"{path}: shard {outside[0]!r} lies elsewhere; expected file names beside the index"
        )
    return home


def one_line(error: BaseException, limit: int = 140) -> str:
    """The text of an error on one line, cut at `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
