"""What a directory holds, which presets its files fit, what is missing for each: `weights check` and `list`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import WeightsError
from wanrt.script.preset import load_preset, preset_names
from wanrt.weights.registry import (
    checkpoint_files,
    file_names,
    find_parts,
    fits,
    hub_file,
    search_directories,
    wanted_parts,
)

if TYPE_CHECKING:
    from wanrt.script.preset import Preset
    from wanrt.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Held:
    """One file: what it is, the presets it fits ("name: part"), or what is wrong with it."""

    path: str
    what: str
    fits: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Readiness:
    """One preset: its parts that are there (part -> file), those that are not, and how to get them.

    unfit: parts whose file, looked into, is something else.
    """

    preset: str
    found: dict[str, str]
    missing: tuple[str, ...]
    embedded: bool
    can_pull: bool
    unfit: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """What to do about what is missing or something else."""
        if self.unfit:
            parts = ", ".join(part.replace("_", " ") for part in self.unfit)
            return f"{parts} of other sizes: {self.found[self.unfit[0]]}"
        if not self.missing:
            return "ready"
        parts = ", ".join(part.replace("_", " ") for part in self.missing)
        pull = f"; wanrt weights pull {self.preset}" if self.can_pull else ""
        return f"missing {parts}{pull}"


def presets() -> tuple[Preset, ...]:
    """The bundled presets."""
    return tuple(load_preset(name) for name in preset_names())


def survey(path: Path, *, deep: bool = False) -> list[Held]:
    """What a directory, or one file, holds. `deep` reads every tensor and looks for NaN and Inf.

    Raises WeightsError when nothing is there.
    """
    if not path.exists():
        raise WeightsError(f"{path}: no such file or directory; expected a weights directory")
    held = [_look(file, path, deep) for file in ([path] if path.is_file() else _files(path))]
    if not held:
        raise WeightsError(
            f"{path}: no checkpoint in it; wanrt weights pull NAME --weights {path} fetches one"
        )
    return held


def readiness(preset: Preset, weights: Path | None, held: Iterable[Held] = ()) -> Readiness:
    """Whether a preset can run from `weights`, or from the default places.

    held: what `survey` found in `weights`: those files are known by what is in them, all others by their names.
    """
    found = find_parts(preset, search_directories(weights))
    surveyed = {} if weights is None else {weights / item.path: item for item in held}
    unfit = tuple(
        part
        for part, path in found.items()
        if path in surveyed and not any(fit.startswith(_fit(preset, part)) for fit in surveyed[path].fits)
    )
    missing = tuple(part for part in wanted_parts(preset) if part not in found)
    return Readiness(
        preset.name,
        {part: str(path) for part, path in found.items()},
        missing,
        preset.weights.embedded,
        not preset.weights.embedded and all(hub_file(preset, part) for part in missing),
        tuple(part for part in unfit if part != "lora"),
    )


def _fit(preset: Preset, part: str) -> str:
    """How `Held.fits` begins for a part of a preset."""
    return f"{preset.name} ({part.replace('_', ' ')}"


def as_data(held: list[Held], ready: list[Readiness]) -> dict[str, Any]:
    """For --json."""
    return {"files": [asdict(item) for item in held], "presets": [asdict(item) for item in ready]}


def check_text(held: list[Held], ready: list[Readiness]) -> str:
    """The report of `wanrt weights check`."""
    lines = []
    for item in held:
        lines.append(f"{item.path}: {item.error or item.what}")
        lines += [f"    fits {fit}" for fit in item.fits]
    return "\n".join([*lines, "", *_table([(item.preset, item.advice) for item in ready])])


def list_text(ready: list[Readiness], directories: tuple[Path, ...]) -> str:
    """The report of `wanrt weights list`."""
    lines = []
    for item in ready:
        lines.append(
            f"{item.preset}: {'inside wanrt' if item.embedded and not item.missing else item.advice}"
        )
        lines += [
            f"    {part.replace('_', ' ')}: {path}" for part, path in item.found.items() if not item.embedded
        ]
    return "\n".join([*lines, "", f"searched: {', '.join(map(str, directories))}"])


def _files(directory: Path) -> Iterator[Path]:
    yield from checkpoint_files(directory)
    yield from sorted(directory.rglob("tokenizer.json"))


def _look(path: Path, root: Path, deep: bool) -> Held:
    name = str(path.relative_to(root)) if root.is_dir() else str(path)
    if path.name == "tokenizer.json":
        return _look_at_tokenizer(path, name)
    from wanrt.weights.checkpoint import open_checkpoint
    from wanrt.weights.loading import check_finite

    try:
        checkpoint = open_checkpoint(path)
        if deep:
            check_finite(checkpoint)
    except WeightsError as error:
        return Held(name, "", error=str(error).removeprefix(f"{path}: "))
    return Held(name, checkpoint.describe(), tuple(_fitting(path, checkpoint)))


def _look_at_tokenizer(path: Path, name: str) -> Held:
    from wanrt.models.tokenizer import PromptTokenizer
    from wanrt.weights.loading import belong_together

    try:
        size = PromptTokenizer.from_file(path).vocab_size
    except WeightsError as error:
        return Held(name, "", error=str(error).removeprefix(f"{path}: "))
    fitting = [
        f"{preset.name} (tokenizer)" for preset in presets() if belong_together(size, preset.text.vocab)
    ]
    return Held(name, f"tokenizer, {size} tokens", tuple(fitting))


def _fitting(path: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """Where a file fits: by sizes, and for transformers said with care, for sizes do not tell a fine-tune."""
    for preset in presets():
        for part in ("transformer", "vae", "text_encoder"):
            if fits(preset, part, checkpoint):
                named = part != "transformer" or any(str(path).endswith(n) for n in file_names(preset, part))
                yield f"{_fit(preset, part)}{'' if named else ', by its sizes'})"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows]
