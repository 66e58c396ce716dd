"""Tensor names: what a set of names is, and the way between the public naming schemes.

wanrt's modules use the *original* names of Wan2.1 (Wan-Video/Wan2.1 `wan/modules/{model,vae,t5}.py` at
9737cba). This file translates the *diffusers* names of the transformer and the VAE (diffusers 0.42.1
`WanTransformer3DModel`, `AutoencoderKLWan`) and the *transformers* names of UMT5 (transformers 5.23
`UMT5EncoderModel`) to them and back. Values and shapes are the same in both: only names differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a checkpoint is."""

    TRANSFORMER = "transformer"
    VAE = "vae"
    TINY_VAE = "tiny vae"
    TEXT_ENCODER = "text encoder"
    LORA = "lora"
    UNKNOWN = "unknown"


class Naming(StrEnum):
    """Which scheme its names follow. ORIGINAL is what wanrt's modules use."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class _Signature:
    kind: Kind
    naming: Naming
    marks: tuple[str, ...]  # a set of names that holds them all is of this kind


_SIGNATURES = (
    _Signature(Kind.TRANSFORMER, Naming.ORIGINAL, ("patch_embedding.weight", "blocks.0.self_attn.q.weight")),
    _Signature(Kind.TRANSFORMER, Naming.DIFFUSERS, ("patch_embedding.weight", "blocks.0.attn1.to_q.weight")),
    _Signature(Kind.VAE, Naming.ORIGINAL, ("decoder.conv1.weight", "decoder.head.2.weight")),
    _Signature(Kind.VAE, Naming.DIFFUSERS, ("decoder.conv_in.weight", "decoder.conv_out.weight")),
    _Signature(Kind.TEXT_ENCODER, Naming.ORIGINAL, ("token_embedding.weight", "blocks.0.attn.q.weight")),
    _Signature(
        Kind.TEXT_ENCODER,
        Naming.TRANSFORMERS,
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
    ),
    # madebyollin/taehv taehv.py at 1f14a56: two nn.Sequential, memory blocks inside.
    _Signature(Kind.TINY_VAE, Naming.ORIGINAL, ("decoder.1.weight", "decoder.3.conv.0.weight")),
)


def identify_names(names: Iterable[str]) -> tuple[Kind, Naming]:
    """Tell what a set of unwrapped names is; (UNKNOWN, ORIGINAL) when nothing fits."""
    known = set(names)
    for signature in _SIGNATURES:
        if known.issuperset(signature.marks):
            return signature.kind, signature.naming
    if any(".lora_A." in name or ".lora_down." in name for name in known):
        return Kind.LORA, Naming.ORIGINAL
    return Kind.UNKNOWN, Naming.ORIGINAL


# Components that wrappers put in front of, or between, the names of the model they wrap: FSDP, torch.compile,
# activation checkpointing.
_INNER_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
# Components that only count as wrappers in front: DDP and Lightning (`module`, `model`), the modules that
# fine-tunes keep their model in (`model`, `generator`, `diffusion_model`; `base_model` is PEFT's, `transformer`
# diffusers' for LoRAs).
_OUTER_WRAPPERS = {
    "module",
    "model",
    "base_model",
    "transformer",
    "generator",
    "generator_ema",
    "diffusion_model",
}


def unwrap_name(name: str) -> str:
    """Drop the prefixes that training wrappers left: `module.model._orig_mod.x` is `x`."""
    parts = [part for part in name.split(".") if part not in _INNER_WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER_WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def unwrap_names(names: Iterable[str]) -> dict[str, str]:
    """Map unwrapped name -> name in the file. Raises ValueError when two names become one."""
    pairs = [(unwrap_name(name), name) for name in names]
    clashes = [name for name, count in Counter(short for short, _ in pairs).items() if count > 1]
    if clashes:
        raise ValueError(
            f"{len(clashes)} tensor names are there twice under different wrappers: {clashes[0]}"
        )
    return dict(pairs)


# Each row: original, other. `{i}` is an index that both sides share.
_TRANSFORMER_DIFFUSERS = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    *(
        (f"blocks.{{i}}.{ours}.{a}", f"blocks.{{i}}.{theirs}.{b}")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    ("blocks.{i}.norm3", "blocks.{i}.norm2"),
    ("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    ("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
)

_TEXT_TRANSFORMERS = (
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.{i}.norm1", "encoder.block.{i}.layer.0.layer_norm"),
    *(
        (f"blocks.{{i}}.attn.{p}", f"encoder.block.{{i}}.layer.0.SelfAttention.{p}")
        for p in ("q", "k", "v", "o")
    ),
    (
        "blocks.{i}.pos_embedding.embedding",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
    ),
    ("blocks.{i}.norm2", "encoder.block.{i}.layer.1.layer_norm"),
    ("blocks.{i}.ffn.gate.0", "encoder.block.{i}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{i}.ffn.fc1", "encoder.block.{i}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{i}.ffn.fc2", "encoder.block.{i}.layer.1.DenseReluDense.wo"),
)

# Inside a residual block of the VAE, and inside its middle.
_RESNET = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_ATTENTION = (("norm", "norm"), ("to_qkv", "to_qkv"), ("proj", "proj"))
_RESAMPLE = (("resample.1", "resample.1"), ("time_conv", "time_conv"))


def _vae_rows(up_block_length: int) -> tuple[tuple[str, str], ...]:
    """Rows of the VAE; `up_block_length` counts an up block's residual blocks and its upsampler.

    The original decoder numbers all layers in one list, diffusers per up block: that is the one place where
    an index changes.
    """
    rows = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        rows += [(f"{half}.conv1", f"{half}.conv_in")]
        rows += [(f"{half}.head.0", f"{half}.norm_out"), (f"{half}.head.2", f"{half}.conv_out")]
        for place, resnet in ((0, "resnets.0"), (2, "resnets.1")):
            rows += [(f"{half}.middle.{place}.{a}", f"{half}.mid_block.{resnet}.{b}") for a, b in _RESNET]
        rows += [(f"{half}.middle.1.{a}", f"{half}.mid_block.attentions.0.{b}") for a, b in _ATTENTION]
    rows += [
        (f"encoder.downsamples.{{i}}.{a}", f"encoder.down_blocks.{{i}}.{b}") for a, b in _RESNET + _RESAMPLE
    ]
    for layer in range(8 * up_block_length):  # eight up blocks: more than any published VAE of this family
        block, place = divmod(layer, up_block_length)
        ours, theirs = f"decoder.upsamples.{layer}", f"decoder.up_blocks.{block}"
        rows += [(f"{ours}.{a}", f"{theirs}.resnets.{place}.{b}") for a, b in _RESNET]
        if place == up_block_length - 1:
            rows += [(f"{ours}.{a}", f"{theirs}.upsamplers.0.{b}") for a, b in _RESAMPLE]
    return tuple(rows)


def to_original(names: Iterable[str], kind: Kind, naming: Naming) -> dict[str, str]:
    """Map original name -> given name, for unwrapped names.

    A name without a counterpart keeps its own, so that the strict check can list it. transformers stores the
    token embedding twice (`shared`, `encoder.embed_tokens`): one of them is enough. Raises ValueError when two
    names mean one tensor.
    """
    names = list(names)
    if naming is Naming.ORIGINAL:
        return {name: name for name in names}
    rename = _Renamer((theirs, ours) for ours, theirs in _rows(kind, _diffusers_up_length(names)))
    tied = "encoder.embed_tokens.weight" if kind is Kind.TEXT_ENCODER else None
    found: dict[str, str] = {}
    for name in names:
        if name != tied and found.setdefault(rename(name), name) != name:
            raise ValueError(f"{name} and {found[rename(name)]} are both {rename(name)}")
    if tied in names:
        found.setdefault("token_embedding.weight", tied)
    return found


def from_original(names: Iterable[str], kind: Kind, naming: Naming) -> dict[str, str]:
    """Map original name -> name in the scheme `naming`. Raises KeyError for a name without one."""
    names = list(names)
    if naming is Naming.ORIGINAL:
        return {name: name for name in names}
    rename = _Renamer(_rows(kind, _original_up_length(names)))
    renamed = {name: rename(name) for name in names}
    foreign = [name for name in names if not rename.knows(name)]
    if foreign:
        raise KeyError(f"{foreign[0]} has no {naming} name")
    return renamed


def other_naming(kind: Kind) -> Naming | None:
    """The second public naming scheme of a kind; None where there is one scheme only."""
    return {
        Kind.TRANSFORMER: Naming.DIFFUSERS,
        Kind.VAE: Naming.DIFFUSERS,
        Kind.TEXT_ENCODER: Naming.TRANSFORMERS,
    }.get(kind)


def _rows(kind: Kind, up_block_length: int) -> tuple[tuple[str, str], ...]:
    if kind is Kind.TRANSFORMER:
        return _TRANSFORMER_DIFFUSERS
    if kind is Kind.TEXT_ENCODER:
        return _TEXT_TRANSFORMERS
    if kind is Kind.VAE:
        return _vae_rows(up_block_length)
    raise KeyError(f"a {kind} has one naming scheme only")


def _diffusers_up_length(names: Iterable[str]) -> int:
    """Layers of an up block under diffusers names: its resnets and the upsampler."""
    places = (re.match(r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", name) for name in names)
    return max((int(m[1]) for m in places if m), default=2) + 2


def _original_up_length(names: Iterable[str]) -> int:
    """Layers of an up block under original names: the first layer with a `resample` ends the first block."""
    places = (re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in names)
    return min((int(m[1]) for m in places if m), default=3) + 1


class _Renamer:
    """Renames the module part of a tensor name by rows of (from, to); `{i}` stands for one shared index."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self._rows: Mapping[str, str] = dict(rows)

    def __call__(self, name: str) -> str:
        return self._lookup(name) or name

    def knows(self, name: str) -> bool:
        return self._lookup(name) is not None

    def _lookup(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        for key, suffix in ((name, ""), (module, f".{leaf}")):
            if key in self._rows:
                return self._rows[key] + suffix
            index = re.search(r"(?<=\.)\d+(?=\.)", key)
            pattern = key[: index.start()] + "{i}" + key[index.end() :] if index else ""
            if index and pattern in self._rows:
                return self._rows[pattern].replace("{i}", index[0]) + suffix
        return None
