"""Where the files of a preset are: the directories searched, what is missing, how to get it.

Imports no torch until it has to look into a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from wanrt.errors import WeightsError
from wanrt.weights.files import find_checkpoints
from wanrt.weights.names import Kind

if TYPE_CHECKING:
    from wanrt.script.preset import Preset
    from wanrt.weights.checkpoint import Checkpoint

logger = logging.getLogger("wanrt.weights")

VARIABLE = "WANRT_WEIGHTS"  # environment: the weights directory, in place of the user's data directory
PARTS = ("transformer", "lora", "vae", "text_encoder", "tokenizer")

# Names of the embedded model's files inside the wheel (wanrt/tiny/assets), and in a directory that replaces them.
EMBEDDED = {
    "transformer": ("transformer.safetensors",),
    "vae": ("vae.safetensors",),
    "text_encoder": ("text_encoder.safetensors",),
    "tokenizer": ("tokenizer.json",),
}
# Parts that are the same network for every model, so that a file may be known by what it holds. Transformers are
# not among them: the public Wan2.1 1.3B, which is not causal, has the very tensors of its causal fine-tunes.
KNOWN_BY_CONTENT = ("vae", "text_encoder")
MAX_DEPTH = 4  # directory levels below a weights directory that are looked into


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    lora: Path | None = None


@dataclass(frozen=True)
class HubFile:
    """A file on a Hugging Face hub: repository `owner/name` and the path in it."""

    repository: str
    path: str

    @classmethod
    def parse(cls, text: str) -> HubFile:
        """Read `owner/name:path/in/it`. Raises WeightsError for anything else."""
        repository, _, path = text.partition(":")
        if repository.count("/") != 1 or not path or path.startswith("/") or ".." in path.split("/"):
            raise WeightsError(f"hub source {text!r}: expected owner/repository:path")
        return cls(repository, path)

    def local(self, directory: Path) -> Path:
        """Where the file belongs in a weights directory: `<repository's name>/<path>`, as people download by hand."""
        return directory / self.repository.split("/")[1] / self.path


def data_directory() -> Path:
    """The user's own weights directory; need not exist."""
    return Path(platformdirs.user_data_dir("wanrt", appauthor=False)) / "weights"


def weights_directory(weights: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where `wanrt weights pull` puts files: `--weights`, or WANRT_WEIGHTS, or the user's data directory."""
    if weights is not None:
        return weights
    return Path(environ[VARIABLE]).expanduser() if environ.get(VARIABLE) else data_directory()


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what other programs downloaded (its environment variables, in its order)."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def search_directories(weights: Path | None, environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Directories that are searched, in order. Raises WeightsError when `weights` is given and not there.

    `weights` may also be a checkpoint of the transformer: then its directory comes first.
    """
    if weights is not None and not weights.exists():
        raise WeightsError(
            f"{weights}: no such file or directory; expected a weights directory or a checkpoint"
        )
    first = [] if weights is None else [weights if weights.is_dir() else weights.parent]
    return tuple(dict.fromkeys([*first, weights_directory(None, environ)]))


def resolve(preset: Preset, weights: Path | None, environ: Mapping[str, str] = os.environ) -> ModelFiles:
    """The files of a preset, without reading tensors.

    `weights` is a directory that is searched first, or a checkpoint to use as the transformer; then come
    WANRT_WEIGHTS or the user's data directory, Hugging Face's own cache, and for an embedded model the wheel.

    Raises WeightsError that names what is missing, where it was looked for, and the command that fetches it.
    """
    directories = search_directories(weights, environ)
    found = find_parts(preset, directories, environ)
    wanted = wanted_parts(preset)
    if weights is not None and weights.is_file():
        found["transformer"] = weights
        wanted = _parts_beside(preset, weights)
    missing = [part for part in wanted if part not in found]
    if missing:
        hint = _candidate(preset, weights) if "transformer" in missing and weights else ""
        raise WeightsError(_missing(preset, missing, directories) + hint)
    files = {part: found[part] for part in wanted}
    for part, path in files.items():
        logger.info("%s: %s is %s", preset.name, part, path)
    return ModelFiles(**files)


def wanted_parts(preset: Preset) -> tuple[str, ...]:
    """Parts that a preset needs; the LoRA only where it names one."""
    return tuple(part for part in PARTS if part != "lora" or preset.weights.lora)


def find_parts(
    preset: Preset, directories: tuple[Path, ...], environ: Mapping[str, str] = os.environ
) -> dict[str, Path]:
    """Part -> file, for the parts that are there."""
    found = {part: _find(preset, part, directories, environ) for part in wanted_parts(preset)}
    return {part: path for part, path in found.items() if path is not None}


def file_names(preset: Preset, part: str) -> tuple[str, ...]:
    """Paths, relative to a weights directory, that a part may have; best first."""
    names = EMBEDDED.get(part, ()) if preset.weights.embedded else getattr(preset.weights, part)
    source = hub_file(preset, part)
    return (*([str(source.local(Path()))] if source else []), *names)


def hub_file(preset: Preset, part: str) -> HubFile | None:
    """Where a part can be pulled from, or None."""
    text = preset.weights.hub.get(part)
    return HubFile.parse(text) if text else None


def checkpoint_files(directory: Path) -> Iterator[Path]:
    """Every checkpoint below a directory (indexes stand for their shards), hidden directories left out."""
    for folder, depth in _folders(directory, 0):
        if depth <= MAX_DEPTH:
            yield from find_checkpoints(folder)


def fits(preset: Preset, part: str, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of this part's kind and sizes; what no shape tells is left out of the comparison."""
    from dataclasses import replace

    from wanrt.models.config import TransformerConfig
    from wanrt.models.text_encoder import TextEncoderConfig
    from wanrt.models.vae import VaeConfig

    match part, checkpoint.config:
        case "transformer", TransformerConfig() as got:
            want = preset.transformer_config()
            same_width = got.dim == want.dim
            return same_width and replace(got, text_len=want.text_len, num_heads=want.num_heads) == want
        case "vae", VaeConfig() as got:
            want_vae = preset.vae_config()
            same = replace(got, latents_mean=want_vae.latents_mean, latents_std=want_vae.latents_std)
            return preset.vae.kind == "wan" and same == want_vae
        case "text_encoder", TextEncoderConfig() as got:
            return got == preset.text_config()
    return part == "vae" and preset.vae.kind == "taehv" and checkpoint.kind is Kind.TINY_VAE


def _parts_beside(preset: Preset, transformer: Path) -> tuple[str, ...]:
    """Parts that go with a transformer named by the user. A LoRA belongs to its base, which is known by its name."""
    wanted = wanted_parts(preset)
    bases = {Path(name).name for name in file_names(preset, "transformer")}
    if "lora" not in wanted or transformer.name in bases:
        return wanted
    logger.warning("%s: taken as complete, without the LoRA that goes with %s", transformer, min(bases))
    return tuple(part for part in wanted if part != "lora")


def _find(
    preset: Preset, part: str, directories: tuple[Path, ...], environ: Mapping[str, str]
) -> Path | None:
    for directory in _places(preset, directories, environ):
        for name in file_names(preset, part):
            if (directory / name).is_file():
                return directory / name
    if cached := _find_cached(hub_file(preset, part), environ):
        return cached
    if part in KNOWN_BY_CONTENT and not preset.weights.embedded:
        return _find_by_content(preset, part, directories)
    return _asset(part) if preset.weights.embedded else None


def _places(preset: Preset, directories: tuple[Path, ...], environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where to look by name. An embedded model has plain names (vae.safetensors): only a directory that the user
    names for this run may replace its files, not the one where all models lie.
    """
    shared = weights_directory(None, environ)
    return tuple(d for d in directories if d != shared) if preset.weights.embedded else directories


def _find_cached(source: HubFile | None, environ: Mapping[str, str]) -> Path | None:
    """A file in Hugging Face's cache; of several snapshots the newest."""
    if source is None:
        return None
    snapshots = hub_cache(environ) / f"models--{source.repository.replace('/', '--')}" / "snapshots"
    found = [folder / source.path for folder in snapshots.glob("*") if (folder / source.path).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _find_by_content(preset: Preset, part: str, directories: tuple[Path, ...]) -> Path | None:
    """The first file that holds this part under whatever name."""
    files = (path for directory in directories for path in checkpoint_files(directory))
    return _first_that_fits(preset, part, files)


def _first_that_fits(preset: Preset, part: str, files: Iterator[Path]) -> Path | None:
    for path in files:
        from wanrt.weights.checkpoint import open_checkpoint  # here, so that nothing to open needs no torch

        try:
            checkpoint = open_checkpoint(path)
        except WeightsError as error:
            logger.info("passed over: %s", error)  # foreign or damaged
            continue
        if fits(preset, part, checkpoint):
            return path
    return None


def _candidate(preset: Preset, directory: Path) -> str:
    """A hint at a file that could be the transformer, for the user to decide: sizes do not tell a fine-tune."""
    path = _first_that_fits(preset, "transformer", checkpoint_files(directory))
    return f" ({path} would fit by its sizes: if it is the one, --weights {path})" if path else ""


def _asset(part: str) -> Path | None:
    """A file of the embedded model."""
    assets = Path(str(resources.files("wanrt.tiny"))) / "assets"
    paths = (assets / name for name in EMBEDDED.get(part, ()))
    return next((path for path in paths if path.is_file()), None)


def _folders(directory: Path, depth: int) -> Iterator[tuple[Path, int]]:
    yield directory, depth
    if depth >= MAX_DEPTH or not directory.is_dir():
        return
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        logger.info("passed over: %s (%s)", directory, error.strerror)
        return
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _folders(entry, depth + 1)


def _missing(preset: Preset, missing: list[str], directories: tuple[Path, ...]) -> str:
    parts = ", ".join(f"{part.replace('_', ' ')} ({file_names(preset, part)[-1]})" for part in missing)
    where = ", ".join(map(str, directories))
    if preset.weights.embedded:
        return f"{preset.name}: this installation lacks its embedded {parts}; reinstall wanrt"
    if all(hub_file(preset, part) for part in missing):
        return f"{preset.name}: missing {parts}; searched {where}; get them with: wanrt weights pull {preset.name}"
    return f"{preset.name}: missing {parts}; searched {where}; put them there or name the directory with --weights"
