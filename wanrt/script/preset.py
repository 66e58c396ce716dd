"""Model presets: `presets/*.toml` with `kind = "model"`, read once into a frozen, checked `Preset`.

A preset holds numbers only and imports no torch; `Preset.transformer_config()` and its siblings build the
model rooms' dataclasses when a pipeline asks for them.
"""

from __future__ import annotations

from enum import StrEnum
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from wanrt.errors import ScriptError, UsageError
from wanrt.script import units
from wanrt.script.findings import in_file, report
from wanrt.script.source import Source, parse

if TYPE_CHECKING:
    from wanrt.models.config import TransformerConfig
    from wanrt.models.text_encoder import TextEncoderConfig
    from wanrt.models.vae import VaeConfig

PRESET_PACKAGE = "wanrt_presets"  # the folder `presets/`, also inside the wheel


class Table(BaseModel):
    """A table of a TOML file: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CacheKind(StrEnum):
    """How the KV cache of a causal model goes on; the words of `CachePolicy` in wanrt/models/kv_cache.py."""

    RECOMPUTE = "recompute"  # a context pass over clean latents before every chunk
    ROLLING = "rolling"  # the newest frames' keys and values, a commit pass after every chunk
    SINK = "sink"  # the first frames for good, then rolling


class TransformerShape(Table):
    """Sizes of the transformer; the fields of `TransformerConfig`."""

    dim: int = Field(gt=0)
    ffn_dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    text_dim: int = Field(default=4096, gt=0)
    text_len: int = Field(default=512, gt=0)
    freq_dim: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> TransformerShape:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise units.Expected(f"dim = num_heads x an even head size; {self.dim} / {self.num_heads} is not")
        return self


class VaeShape(Table):
    """Sizes of the VAE; the fields of `VaeConfig`. `kind` names the class: wan (LightVAE too) or taehv."""

    kind: Literal["wan", "taehv"] = "wan"
    base_dim: int = Field(default=96, gt=0)
    z_dim: int = Field(default=16, gt=0)
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = Field(default=2, gt=0)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] | None = None  # None: the sixteen values of Wan 2.1
    latents_std: tuple[float, ...] | None = None


class TextShape(Table):
    """Sizes of the UMT5 encoder; the fields of `TextEncoderConfig`. Defaults: UMT5-XXL."""

    vocab: int = Field(default=256384, gt=0)
    dim: int = Field(default=4096, gt=0)
    attn_dim: int = Field(default=4096, gt=0)
    ffn_dim: int = Field(default=10240, gt=0)
    num_heads: int = Field(default=64, gt=0)
    num_layers: int = Field(default=24, gt=0)
    num_buckets: int = Field(default=32, gt=0)


class Cache(Table):
    """The KV cache. `window`: the latent frames that a new chunk sees before itself, the sink among them."""

    policy: CacheKind
    window: int = Field(ge=1, le=48)
    sink: int = Field(default=0, ge=0)
    bias: float = Field(default=1.0, gt=0, le=1)  # factor b of the KV attention bias log(b); 1 is off

    @model_validator(mode="after")
    def _sink_fits(self) -> Cache:
        if (self.policy is CacheKind.SINK) != (self.sink > 0):
            raise units.Expected('sink > 0 with policy = "sink", and only then')
        if self.sink >= self.window:
            raise units.Expected(f"sink < window; {self.sink} >= {self.window}")
        return self


class Sampling(Table):
    """Timesteps of one chunk. `warped`: they are what the model sees; else `shift` is applied to them."""

    steps: tuple[float, ...] = Field(min_length=1)
    warped: bool
    shift: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _steps_fall(self) -> Sampling:
        units.steps(self.steps)
        return self

    def timesteps(self) -> tuple[float, ...]:
        """Timesteps as the model sees them, from 1000 down, the final 0 left out."""
        return self.steps if self.warped else tuple(warp(t, self.shift) for t in self.steps)

    def evenly(self, count: int) -> tuple[float, ...]:
        """`count` timesteps, evenly spaced and then warped: 4 with shift 5 is 1000, 937.5, 833.3, 625."""
        return tuple(warp(units.MAX_TIMESTEP * (count - i) / count, self.shift) for i in range(count))


def warp(t: float, shift: float) -> float:
    """t' = 1000 s', s' = shift s / (1 + (shift - 1) s), s = t / 1000.

    Source: Wan-Video/Wan2.1 wan/utils/fm_solvers.py (flow shift) at 9737cba; guandeh17/Self-Forcing
    utils/scheduler.py at 33593df.
    """
    s = t / units.MAX_TIMESTEP
    return units.MAX_TIMESTEP * shift * s / (1 + (shift - 1) * s)


Size = Annotated[tuple[int, int], BeforeValidator(units.size)]


class Video(Table):
    """What the model was trained to make, and so the defaults: the first of `sizes`, `fps`."""

    sizes: tuple[Size, ...] = Field(min_length=1)
    fps: Annotated[Any, AfterValidator(units.fps)] = 16
    anchor: str = "anchor-only"


class Weights(Table):
    """Where the tensors are: file names below the weights directory, tried in order; hub sources."""

    embedded: bool = False  # shipped inside the wheel (wanrt.tiny)
    transformer: tuple[str, ...] = ()
    vae: tuple[str, ...] = ("Wan2.1_VAE.pth",)
    text_encoder: tuple[str, ...] = ("models_t5_umt5-xxl-enc-bf16.pth",)
    tokenizer: tuple[str, ...] = ("google/umt5-xxl/tokenizer.json", "tokenizer.json")
    lora: tuple[str, ...] = ()
    hub: dict[str, str] = Field(default_factory=dict)  # part -> "owner/repository:path in it"


class Preset(Table):
    """One model with all its numbers. Frozen; made by `load_preset`."""

    kind: Literal["model"]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    about: str = ""
    transformer: TransformerShape
    vae: VaeShape = VaeShape()
    text: TextShape = TextShape()
    cache: Cache
    sampling: Sampling
    video: Video
    weights: Weights = Weights()
    chunk: Literal[3] = 3  # latent frames; all causal Wan models so far use three

    @property
    def steps(self) -> tuple[float, ...]:
        """Timesteps as the model sees them."""
        return self.sampling.timesteps()

    def transformer_config(self) -> TransformerConfig:
        """The transformer's configuration."""
        from wanrt.models.config import TransformerConfig

        return TransformerConfig(**self.transformer.model_dump())

    def vae_config(self) -> VaeConfig:
        """The VAE's configuration (imports torch)."""
        from wanrt.models.vae import VaeConfig

        return VaeConfig(**self.vae.model_dump(exclude={"kind"}, exclude_none=True))

    def text_config(self) -> TextEncoderConfig:
        """The text encoder's configuration (imports torch)."""
        from wanrt.models.text_encoder import TextEncoderConfig

        return TextEncoderConfig(**self.text.model_dump())


def preset_names() -> tuple[str, ...]:
    """Names of the bundled models, sorted."""
    return _bundled("model")


def demo_names() -> tuple[str, ...]:
    """Names of the bundled prompt files, sorted."""
    return _bundled("prompt")


def bundled(name: str) -> Traversable | None:
    """The bundled TOML file called `name` (without its ending), whatever its kind, or None."""
    found = resources.files(PRESET_PACKAGE) / f"{name}.toml"
    return found if _plain(name) and found.is_file() else None


def is_model(source: Source) -> bool:
    """Whether a TOML file is a model preset (it says `kind = "model"`) and not a prompt file."""
    return source.data.get("kind") == "model"


def load_preset(name: str | Path) -> Preset:
    """The bundled preset called `name`, or the one in the file `name` (a path, or a name that ends in .toml).

    Raises UsageError for an unknown name, ScriptError for a file that is not a preset.
    """
    return read_preset(_source(str(name)))


def read_preset(source: Source) -> Preset:
    """Check the tables of a preset. Raises ScriptError with one line per finding."""
    if not is_model(source):
        raise ScriptError(
            f'{source.name}:1: not a model preset: expected kind = "model"; '
            "a prompt file is rendered with wanrt render FILE"
        )
    try:
        return Preset.model_validate(source.data)
    except ValidationError as bad:
        raise ScriptError(report(in_file(bad, source, Preset), source.name)) from None


def _source(name: str) -> Source:
    if (inside := bundled(name)) is not None:
        return parse(inside.read_bytes(), f"presets/{name}.toml")
    if "/" not in name and not name.endswith(".toml"):
        close = units.nearest(name, preset_names())
        hint = f"did you mean {close}?" if close else f"one of {', '.join(preset_names())}, or a .toml file"
        raise UsageError(f"preset {units.show(name)} is unknown: {hint} (wanrt presets lists them)")
    try:
        return parse(Path(name).read_bytes(), name)
    except OSError as bad:
        raise UsageError(f"preset {units.show(name)} cannot be read: {bad.strerror or bad}") from None


def _bundled(kind: str) -> tuple[str, ...]:
    names = []
    for entry in resources.files(PRESET_PACKAGE).iterdir():
        if entry.name.endswith(".toml"):
            model = is_model(parse(entry.read_bytes(), entry.name))
            names += [entry.name.removesuffix(".toml")] if model == (kind == "model") else []
    return tuple(sorted(names))


def _plain(name: str) -> bool:
    """Whether `name` can only be a file of the package: no folders, nothing hidden."""
    return 0 < len(name) <= 64 and all(c.isalnum() or c in "._-" for c in name) and not name.startswith(".")
