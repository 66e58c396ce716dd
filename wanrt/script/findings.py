"""What is wrong with a file, as one line per finding: file, line, key, what was got, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from wanrt.script.source import Path, Source
from wanrt.script.units import Expected, nearest, printable, show

# What describes the machine or the run, not the video; prompt files travel.
FLAGS_ONLY = (
    "topology", "precision", "attention", "device", "weights", "random_weights", "force", "stats", "trace",
)  # fmt: skip


Finding = tuple[int, str]  # the line (0: not of the file, a flag), and what is wrong


def report(findings: Iterable[Finding], name: str) -> str:
    """Findings as text, one line each: flags first, then the file's in its order, each once."""
    ordered = sorted(findings, key=lambda finding: finding[0])
    return "\n".join(dict.fromkeys(f"{name}:{at}: {text}" if at else text for at, text in ordered))


def in_file(bad: ValidationError, source: Source, model: type[BaseModel]) -> list[Finding]:
    """What pydantic found in a file."""
    return [(source.line(path), text) for path, text in _findings(bad, model)]


def in_flags(bad: ValidationError, model: type[BaseModel]) -> list[Finding]:
    """What pydantic found in values that came as flags."""
    return [
        (0, flag(text) if path else f"flags: {text.partition(': ')[2]}")
        for path, text in _findings(bad, model)
    ]


def broken_keys(bad: ValidationError) -> set[str]:
    """The top-level keys that pydantic found something wrong with."""
    return {str(error["loc"][0]) for error in bad.errors(include_url=False) if error["loc"]}


def flag(line: str) -> str:
    """`line` with the key that it begins with as a flag: random_weights is --random-weights."""
    key = re.match(r"\w+", line)
    return "--" + key[0].replace("_", "-") + line[key.end() :] if key else line


def key_text(path: Path) -> str:
    """A path as people say it: ("scene", 1, "prompt") is "scene 2, prompt"."""
    words: list[str] = []
    for part in path:
        if isinstance(part, int):
            words[-1] = f"{words[-1]} {part + 1}," if words else f"entry {part + 1},"
        elif words and not words[-1].endswith(","):
            words[-1] += f".{printable(part)}"
        else:
            words.append(printable(part))
    return " ".join(words).rstrip(",")


def _findings(bad: ValidationError, model: type[BaseModel]) -> Iterable[tuple[Path, str]]:
    for error in bad.errors(include_url=False):
        path = _path(error["loc"])
        yield path, _sentence(path, error, model)


def _path(loc: tuple[Any, ...]) -> Path:
    return tuple(part if isinstance(part, int) else str(part) for part in loc if part != "[key]")


def _sentence(path: Path, error: Any, model: type[BaseModel]) -> str:
    key = key_text(path) or "the file"
    if error["type"] == "extra_forbidden":
        return _unknown(key, path, model)
    if error["type"] == "missing":
        return f"{key} is missing: add {_example(path)}"
    if error["type"] == "model_type":
        return f"{key}: got {show(error['input'])}; expected a table"
    reason = error.get("ctx", {}).get("error")
    allowed = str(reason) if isinstance(reason, Expected) else error["msg"][:1].lower() + error["msg"][1:]
    got = "" if isinstance(error["input"], dict) else f"got {show(error['input'])}; "
    return f"{key}: {got}expected {allowed}" if isinstance(reason, Expected) else f"{key}: {got}{allowed}"


def _example(path: Path) -> str:
    """What to write for a required key."""
    examples = {"scene": 'a [[scene]] with prompt = "what to show"', "prompt": 'prompt = "what to show"'}
    return examples.get(str(path[-1]), f"{path[-1]} = ...")


def _unknown(key: str, path: Path, model: type[BaseModel]) -> str:
    known = known_keys(model, path[:-1])
    if (elsewhere := _elsewhere(path, model)) is not None:
        return f"{key}: {elsewhere}"
    close = nearest(str(path[-1]), known)
    hint = f"did you mean {close}?" if close else f"known here: {', '.join(known)}"
    return f"{key} is unknown: {hint}"


def _elsewhere(path: Path, model: type[BaseModel]) -> str | None:
    """Where a key belongs that stands in the wrong table of a prompt file."""
    key = str(path[-1])
    if len(path) == 1 and "scene" in model.model_fields and key in known_keys(model, ("scene",)):
        return "belongs to a scene: write it below [[scene]]"
    if len(path) == 3 and key in model.model_fields:
        return "belongs to the whole file: write it above the first [[scene]]"
    if len(path) == 1 and "scene" in model.model_fields and key in FLAGS_ONLY:
        return f"not a key of the file: use the flag {flag(key)}"
    return None


def known_keys(model: type[BaseModel], path: Path) -> tuple[str, ...]:
    """The keys that the table at `path` below `model` knows."""
    here = model
    for part in path:
        if isinstance(part, str) and part in here.model_fields:
            here = _table_of(here.model_fields[part].annotation) or here
    return tuple(here.model_fields)


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `tuple[Scene, ...]` or `Scene | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _table_of(inner)) is not None:
            return found
    return None
