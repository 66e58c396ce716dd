"""Checkpoints from a Hugging Face hub, resumed where an earlier attempt stopped.

huggingface_hub (an extra) knows the endpoint, the user's token and the transfer; the partial file is ours, because its
2.x releases throw theirs away when a download fails, and 28 GB are worth keeping.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import OutputError, RunError, UsageError, WeightsError
from wanrt.weights.registry import HubFile, find_parts, hub_file, search_directories, wanted_parts

if TYPE_CHECKING:
    from wanrt.script.preset import Preset

Say = Callable[[str], None]

INDEX_SUFFIX = ".safetensors.index.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASH_BLOCK = 1 << 22


def pull_preset(
    preset: Preset, directory: Path, say: Say | None = None, endpoint: str | None = None
) -> dict[str, Path]:
    """Fetch the parts of a preset that are not there yet into a weights directory; returns part -> file.

    `say` gets a line for each file; on a terminal there is a progress bar too. None: neither. `endpoint` is the
    hub; None: huggingface_hub's own, which HF_ENDPOINT sets.

    Raises:
        UsageError: huggingface_hub is not installed.
        WeightsError: the preset has nothing to pull, or the hub refuses a file.
        RunError: the download broke off; the same call resumes it.
        OutputError: the directory cannot be written, or is full.
    """
    if preset.weights.embedded:
        raise WeightsError(f"{preset.name}: its weights come with wanrt; there is nothing to pull")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be made ({error.strerror}); name another with --weights"
        ) from error
    files = find_parts(preset, tuple(dict.fromkeys([directory, *search_directories(directory)])))
    for part in wanted_parts(preset):
        source = hub_file(preset, part)
        if part not in files and source is None:
            raise WeightsError(f"{preset.name}: no hub source for its {part}; put the file into {directory}")
        if part not in files and source is not None:
            files[part] = pull(source, directory, say, endpoint)
    return files


def pull(source: HubFile, directory: Path, say: Say | None = None, endpoint: str | None = None) -> Path:
    """Fetch one file, and all shards if it is a safetensors index. Arguments and errors as in `pull_preset`."""
    path = _pull_file(source, directory, say, endpoint)
    if path.name.endswith(INDEX_SUFFIX):
        home = source.path.rpartition("/")[0]
        for shard in sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values())):
            shard_path = f"{home}/{shard}" if home else shard
            _pull_file(HubFile(source.repository, shard_path), directory, say, endpoint)
    return path


def _pull_file(source: HubFile, directory: Path, say: Say | None, endpoint: str | None) -> Path:
    """Fetch one file to its place, by way of a partial file beside it that carries the version's tag."""
    target = source.local(directory)
    if target.is_file():
        return target
    with _one_line_errors(source):
        hub = _huggingface_hub()
        url = hub.hf_hub_url(source.repository, source.path, endpoint=endpoint)
        facts = hub.get_hf_file_metadata(url)
    tag = (facts.etag or "untagged").strip('"')
    partial = target.with_name(f"{target.name}.{re.sub(r'[^0-9A-Za-z]', '', tag)[:12]}.part")
    with _one_line_errors(source):
        partial.parent.mkdir(parents=True, exist_ok=True)
        _check_room(partial, facts.size)
        if say:
            say(_progress_line(source, partial, facts.size))
        _transfer(url, partial, facts.size, quiet=say is None)
    _verify(partial, tag, source)
    partial.replace(target)
    return target


def _transfer(url: str, partial: Path, size: int | None, *, quiet: bool) -> None:
    """Append what is missing of `url` to the partial file; huggingface_hub draws the progress bar on stderr."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    if quiet:
        disable_progress_bars()
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two writers would spoil it
        if size is not None and file.tell() > size:
            file.truncate(0)
        done = file.seek(0, os.SEEK_END)
        http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=size)


def _progress_line(source: HubFile, partial: Path, size: int | None) -> str:
    done = partial.stat().st_size if partial.exists() else 0
    total = "size unknown" if size is None else _bytes(size)
    resumed = f", resumed at {_bytes(done)}" if done else ""
    return f"pulling {source.repository}:{source.path}, {total}{resumed}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _verify(partial: Path, tag: str, source: HubFile) -> None:
    """Compare with the SHA-256 that hubs give large files as their tag; small ones have another tag, of no use here."""
    if not _SHA256.fullmatch(tag):
        return
    digest = hashlib.sha256()
    with partial.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    if digest.hexdigest() != tag:
        partial.unlink()
        raise RunError(
            f"{source.repository}:{source.path}: the download is damaged (SHA-256 differs); pull it again"
        )


def _check_room(partial: Path, size: int | None) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(partial.parent).free
    if size is not None and size - done > free:
        raise OutputError(
            f"{partial.parent}: {free / 1e9:.1f} GB free, {(size - done) / 1e9:.1f} GB needed;"
            " make room or name another directory with --weights"
        )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            "pulling weights needs huggingface_hub, which is not installed; pip install 'wanrt[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _one_line_errors(source: HubFile) -> Iterator[None]:
    """Turn what huggingface_hub and the system raise into wanrt's errors."""
    name = f"{source.repository}:{source.path}"
    try:
        yield
    except (UsageError, OutputError):
        raise
    except Exception as error:  # three HTTP libraries, by version of huggingface_hub
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = " ".join(str(error).split())[:140] or type(error).__name__
        if "GatedRepoError" in kinds:
            raise WeightsError(
                f"{name}: access must be granted by its owner first; then `hf auth login`"
            ) from error
        if kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError"}:
            raise WeightsError(f"{name}: not on the hub (or private: `hf auth login`)") from error
        if isinstance(error, BlockingIOError):
            raise RunError(f"{name}: another process is pulling it; wait for that one") from error
        if isinstance(error, PermissionError):
            raise OutputError(
                f"{error.filename}: cannot be written; name another directory with --weights"
            ) from error
        raise RunError(f"{name}: download broke off ({reason}); the same command resumes it") from error
