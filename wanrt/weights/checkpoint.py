"""What a checkpoint holds: its kind, its naming scheme and the sizes of the model, all read from names and shapes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wanrt.errors import WeightsError
from wanrt.models.config import TransformerConfig
from wanrt.models.text_encoder import TextEncoderConfig
from wanrt.models.vae import VaeConfig
from wanrt.weights.names import Kind, Naming, identify_names, to_original, unwrap_names
from wanrt.weights.sources import MODEL_ENTRIES, Index, TensorSource, open_source

Config = TransformerConfig | VaeConfig | TextEncoderConfig

# Head width of every published Wan2.1 transformer (Wan-Video/Wan2.1 wan/configs at 9737cba: 5120/40, 1536/12).
# Shapes do not tell it.
WAN_HEAD_DIM = 128
# A quarter of Wan2.1's 96: ModelTC/LightX2V lightx2v/models/video_encoders/hf/wan/vae.py (pruning_rate 0.75) at
# f8aee98.
LIGHT_VAE_DIM = 24


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint under original names.

    Attributes:
        source: where the tensors are.
        kind, naming: what it is, and the scheme its names follow in the file.
        names: original tensor name -> name in the file.
        config: sizes read from the shapes; None for a kind without a config, or shapes that do not tell them.
    """

    source: TensorSource
    kind: Kind
    naming: Naming
    names: Mapping[str, str]
    config: Config | None

    @property
    def path(self) -> Path:
        """The file, or the index of the shards."""
        return self.source.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Original name -> shape."""
        return {name: self.source.shape(stored) for name, stored in self.names.items()}

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Tensor (or slice) of an original name, on the CPU as stored. See `TensorSource.read`."""
        return self.source.read(self.names[name], index)

    def dtypes(self) -> Counter[torch.dtype]:
        """How many tensors have which dtype."""
        return Counter(self.source.dtype(stored) for stored in self.names.values())

    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def describe(self) -> str:
        """One line: kind, sizes, naming, dtype."""
        dtype = str(self.dtypes().most_common(1)[0][0]).removeprefix("torch.") if self.names else "empty"
        scheme = "" if self.naming is Naming.ORIGINAL else f", {self.naming} names"
        return f"{describe_sizes(self.kind, self.config)}, {_count(self.parameters())} {dtype}{scheme}"


def open_checkpoint(path: str | Path, entries: Sequence[str] = MODEL_ENTRIES) -> Checkpoint:
    """Open a checkpoint and tell what it is; `entries` as in `open_source`. Reads no tensor data.

    Raises WeightsError for a file that is missing, damaged or refused. Unknown tensors give Kind.UNKNOWN.
    """
    return identify(open_source(path, entries))


def identify(source: TensorSource) -> Checkpoint:
    """Tell what the tensors of a source are, by name and shape."""
    try:
        unwrapped = unwrap_names(source.names())
        kind, naming = identify_names(unwrapped)
        original = to_original(unwrapped, kind, naming)
    except ValueError as error:
        raise WeightsError(f"{source.path}: {error}; expected one model per file") from error
    names = {name: unwrapped[stored] for name, stored in original.items()}
    shapes = {name: source.shape(stored) for name, stored in names.items()}
    config = infer_config(kind, shapes)
    if isinstance(config, VaeConfig):
        config = with_statistics(config, source.metadata())
    return Checkpoint(source, kind, naming, names, config)


def with_statistics(config: VaeConfig, metadata: Mapping[str, str]) -> VaeConfig:
    """The config with the latent statistics that a file carries as metadata, if it does.

    Raises WeightsError when they are not one finite number for each latent channel.
    """
    mean, std = metadata.get("latents_mean"), metadata.get("latents_std")
    return replace(
        config,
        latents_mean=_numbers("latents_mean", mean, config.z_dim) if mean else config.latents_mean,
        latents_std=_numbers("latents_std", std, config.z_dim) if std else config.latents_std,
    )


def _numbers(key: str, text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, json.loads(text)))
    except (ValueError, TypeError, RecursionError):
        numbers = ()
    if len(numbers) == count and all(map(math.isfinite, numbers)):
        return numbers
    raise WeightsError(f"metadata {key}: got {text[:60]!r}, expected a JSON list of {count} numbers")


def infer_config(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> Config | None:
    """Sizes of the model that has these shapes (original names), or None when they do not fit together."""
    try:
        return _READERS[kind](shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None  # no config for this kind, or a tensor that it needs is not there


def count_blocks(names: Mapping[str, object]) -> int:
    """Layers of a model whose tensors are called `blocks.<layer>....`: the highest number plus one."""
    layers = (name.split(".", 2)[1] for name in names if name.startswith("blocks."))
    return max((int(layer) for layer in layers if layer.isdigit()), default=-1) + 1


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> TransformerConfig:
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    frames, rows, columns = patch
    return TransformerConfig(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_layers=count_blocks(shapes),
        num_heads=max(dim // WAN_HEAD_DIM, 1),
        in_channels=in_channels,
        out_channels=shapes["head.head.weight"][0] // math.prod(patch),
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch_size=(frames, rows, columns),
        cross_attn_norm="blocks.0.norm3.weight" in shapes,
        qk_norm="blocks.0.self_attn.norm_q.weight" in shapes,
    )


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> VaeConfig:
    return VaeConfig.from_shapes(shapes)


def _text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> TextEncoderConfig:
    vocab, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return TextEncoderConfig(
        vocab=vocab,
        dim=dim,
        attn_dim=shapes["blocks.0.attn.q.weight"][0],
        ffn_dim=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        num_layers=count_blocks(shapes),
        num_buckets=num_buckets,
    )


_READERS: Mapping[Kind, Callable[[Mapping[str, tuple[int, ...]]], Config]] = {
    Kind.TRANSFORMER: _transformer,
    Kind.VAE: _vae,
    Kind.TEXT_ENCODER: _text_encoder,
}


def describe_sizes(kind: Kind, config: object) -> str:
    """A model's family and sizes in a few words."""
    if isinstance(config, TransformerConfig):
        return f"Wan transformer (dim {config.dim}, {config.num_layers} layers)"
    if isinstance(config, VaeConfig):
        return f"{'LightVAE' if config.base_dim == LIGHT_VAE_DIM else 'Wan VAE'} (base dim {config.base_dim})"
    if isinstance(config, TextEncoderConfig):
        return f"UMT5 encoder (dim {config.dim}, {config.num_layers} layers)"
    names = {Kind.TINY_VAE: "TAEHV tiny VAE", Kind.LORA: "LoRA", Kind.UNKNOWN: "unknown tensors"}
    return names.get(kind, f"damaged {kind}")


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
