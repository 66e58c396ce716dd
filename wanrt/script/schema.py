"""The tables and keys of a prompt file, and the settings that flags may override.

Documented for people in man/wanrt-prompt.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from wanrt.errors import UsageError
from wanrt.parallel.topology import FORMS, Topology
from wanrt.script import units
from wanrt.script.job import ANCHORS, ATTENTIONS, CODECS, PRECISIONS
from wanrt.script.preset import Size, Table
from wanrt.script.timeline import Blend, Curve
from wanrt.script.units import Expected

LONGEST_CHUNKS = 2_000_000
MAX_SCENES = 10_000
MAX_PROMPT = 100_000  # characters; the model reads 512 tokens, so more is a file given by mistake

Steps = Annotated[Any, BeforeValidator(units.steps)]
Seconds = Annotated[Any, BeforeValidator(units.duration)]
Bias = Annotated[
    Any, BeforeValidator(lambda v: units.between(v, 0, 1, "a KV attention bias (1 is off)", above=True))
]
Chunks = Annotated[
    Any, BeforeValidator(lambda v: units.whole(v, 1, LONGEST_CHUNKS, "a number of chunks (12 frames each)"))
]


def _text(what: str) -> BeforeValidator:
    """A validator of non-empty text."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise Expected(f"{what}, not empty")
        return value

    return BeforeValidator(check)


def prompt_text(value: object) -> str:
    """One prompt. How many tokens the model reads of it is the tokenizer's to say."""
    if not isinstance(value, str) or not value.strip():
        raise Expected("text that says what to show, not empty")
    if len(value) > MAX_PROMPT:
        raise Expected(f"a prompt of at most {MAX_PROMPT:,} characters, not {len(value):,}")
    return value.strip()


def blend(value: object) -> Blend:
    """A prompt, or a table of prompts and weights, as pairs whose weights sum to 1."""
    if not isinstance(value, dict):
        return ((prompt_text(value), 1.0),)
    if not value:
        raise Expected('text, or prompts with weights such as { "a sunset" = 0.7, "a storm" = 0.3 }')
    if len(value) > 16:
        raise Expected(f"a blend of at most 16 prompts, not {len(value)}")
    pairs = [(prompt_text(text), _weight(text, weight)) for text, weight in value.items()]
    total = math.fsum(weight for _, weight in pairs)
    return tuple((text, weight / total) for text, weight in pairs)


def _weight(text: str, value: object) -> float:
    try:
        return units.between(value, 0, 1000, "a weight", above=True)
    except Expected as bad:
        raise Expected(f"{bad}, for {units.show(text, 30)}, not {units.show(value)}") from None


class Transition(Table):
    """How a scene begins: a blend from the one before `over` so many seconds, along `curve`."""

    over: Annotated[Any, BeforeValidator(lambda v: units.duration(v, zero=True))]
    curve: Annotated[Any, BeforeValidator(lambda v: Curve(units.choice(v, Curve, "a curve")))] = Curve.LERP

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        """ "cut" and "0.5s" are short for tables."""
        if isinstance(value, str) and value.strip() == "cut":
            return {"over": 0}
        if isinstance(value, dict):
            return value
        try:
            return {"over": units.duration(value, zero=True)}
        except Expected:
            raise Expected('"cut", a time such as "0.5s", or { over = "0.5s", curve = "slerp" }') from None


class SceneTable(Table):
    """One `[[scene]]`."""

    prompt: Annotated[Any, BeforeValidator(blend)]
    duration: Seconds | None = None
    chunks: Chunks | None = None
    transition: Transition | None = None
    bias: Bias | None = None
    steps: Steps | None = None

    @model_validator(mode="after")
    def _one_length(self) -> SceneTable:
        return _one_length(self)


def scenes(value: object) -> object:
    """One or more tables; each is checked on its own."""
    if isinstance(value, list) and 0 < len(value) <= MAX_SCENES:
        return value
    raise Expected(f"[[scene]] tables, 1 to {MAX_SCENES:,}, each with a prompt")


def _word(known: Iterable[str], what: str) -> BeforeValidator:
    return BeforeValidator(lambda value: units.choice(value, known, what))


def _whole(low: int, high: int, what: str) -> BeforeValidator:
    return BeforeValidator(lambda value: units.whole(value, low, high, what))


class Settings(Table):
    """What a file or flags may set. None: not set."""

    preset: Annotated[Any, _text("a preset's name (wanrt presets lists them)")] | None = None
    seed: Annotated[Any, BeforeValidator(units.seed)] | None = None
    size: Size | None = None
    fps: Annotated[Any, BeforeValidator(units.fps)] | None = None
    duration: Seconds | None = None
    chunks: Chunks | None = None
    steps: Steps | None = None
    anchor: Annotated[Any, _word(ANCHORS, "an anchor policy")] | None = None
    window: Annotated[Any, _whole(1, 48, "latent frames")] | None = None
    bias: Bias | None = None
    codec: Annotated[Any, _word(CODECS, "a codec")] | None = None
    quality: Annotated[Any, BeforeValidator(units.quality)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Settings:
        return _one_length(self)


def _one_length(table: Any) -> Any:
    if table.duration is not None and table.chunks is not None:
        raise Expected("duration or chunks, not both")
    return table


class PromptFile(Settings):
    """A whole prompt file."""

    title: Annotated[Any, _text("a title")] | None = None
    scene: Annotated[tuple[SceneTable, ...], BeforeValidator(scenes)]


def check_topology(value: object) -> str:
    """A topology in the grammar of `wanrt.parallel.topology`, or auto. Whether it fits the model comes later."""
    try:
        return "auto" if value == "auto" else str(Topology.parse(str(value)))
    except UsageError:
        raise Expected(FORMS) from None


def check_device(value: object) -> str:
    """auto, cpu, cuda or cuda:N."""
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        return value
    raise Expected("auto, cpu, cuda or cuda:N")


class Flags(Settings):
    """The settings that come from the command line. Those of `Settings` win over the file's."""

    topology: Annotated[str, BeforeValidator(check_topology)] = "single"
    precision: Annotated[str, _word(PRECISIONS, "a precision")] = "auto"
    attention: Annotated[str, _word(ATTENTIONS, "an attention backend")] = "auto"
    device: Annotated[str, BeforeValidator(check_device)] = "auto"
    weights: str | None = None
    random_weights: bool = False
    output: str | None = None
    force: bool = False
    stats: str | None = None
    trace: str | None = None
