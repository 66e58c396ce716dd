"""Checkpoints into modules: strict, checked for NaN, one tensor at a time, straight to the device.

Modules are built on the meta device and filled with `assign`, so a model is in memory once. A tensor that keeps its
dtype on the CPU stays a view of the memory-mapped file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanrt.errors import WeightsError
from wanrt.models.config import TransformerConfig
from wanrt.models.fp8 import Fp8Linear, quantised_weight
from wanrt.models.text_encoder import TextEncoderConfig, UMT5Encoder
from wanrt.models.tokenizer import PromptTokenizer
from wanrt.models.transformer import WanTransformer
from wanrt.models.vae import VaeConfig, WanVae
from wanrt.weights.checkpoint import Checkpoint, describe_sizes, open_checkpoint, with_statistics
from wanrt.weights.lora import BASE_ENTRIES, merge_lora
from wanrt.weights.names import Kind
from wanrt.weights.precision import stored_dtype
from wanrt.weights.sources import MODEL_ENTRIES, Index, TensorSource, sliced_shape

logger = logging.getLogger("wanrt.weights")

Module = TypeVar("Module", bound=nn.Module)
Sizes = TypeVar("Sizes", TransformerConfig, VaeConfig, TextEncoderConfig)
Shape = tuple[int, ...]
# Which part of a tensor this process holds: (name, full shape) -> one slice per axis, or None for all of it.
Slicer = Callable[[str, Shape], Index | None]

LISTED = 10  # findings that an error spells out
USED_EMBEDDINGS = 4  # embeddings per token of the tokenizer, above which the two do not belong together


def load_transformer(
    path: str | Path,
    config: TransformerConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    lora: str | Path | None = None,
) -> WanTransformer:
    """Load a causal Wan transformer from any public format.

    `config` is what the caller needs; left out, sizes are read from the file. `lora` is merged into the weights.
    Raises WeightsError for a file of another kind or size, tensors that are missing, extra or misshapen, NaN or Inf.
    """
    checkpoint = open_transformer(path, lora)
    config = config or _sizes(checkpoint, TransformerConfig)
    return fill(build_on_meta(lambda: WanTransformer(config)), checkpoint, device, dtype)


def open_transformer(path: str | Path, lora: str | Path | None = None) -> Checkpoint:
    """Open a transformer checkpoint for `fill`, with a LoRA merged in where one is given."""
    checkpoint = expect_kind(open_checkpoint(path, BASE_ENTRIES if lora else MODEL_ENTRIES), Kind.TRANSFORMER)
    return merge_lora(checkpoint, lora) if lora else checkpoint


def load_vae(
    path: str | Path,
    config: VaeConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load a Wan VAE, a LightVAE, or a TAEHV stand-in: the tensors decide. See `load_transformer`.

    Mean and standard deviation of the latents belong to the weights: a safetensors file may carry its own as
    metadata (`latents_mean`, `latents_std`: JSON lists), else those of `config`, else Wan2.1's are used.
    """
    checkpoint = expect_kind(open_checkpoint(path), Kind.VAE, Kind.TINY_VAE)
    if checkpoint.kind is Kind.TINY_VAE:
        return _load_tiny_vae(checkpoint, device, dtype)
    found = _sizes(checkpoint, VaeConfig)
    wanted = with_statistics(config, checkpoint.source.metadata()) if config else found
    return fill(build_on_meta(lambda: WanVae(wanted)), checkpoint, device, dtype)


def _load_tiny_vae(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    from wanrt.models.tiny_vae import TinyVae, TinyVaeConfig

    try:
        config = TinyVaeConfig.from_shapes(checkpoint.shapes())
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{checkpoint.path}: a TAEHV of a variant that wanrt does not know ({error})"
        ) from error
    return fill(build_on_meta(lambda: TinyVae(config)), checkpoint, device, dtype)


def load_text_encoder(
    path: str | Path,
    config: TextEncoderConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    done: Callable[[int, int], None] = lambda count, of: None,
) -> UMT5Encoder:
    """Load a UMT5 encoder, original or transformers names. See `load_transformer`, for `done` see `fill`."""
    checkpoint = expect_kind(open_checkpoint(path), Kind.TEXT_ENCODER)
    config = config or _sizes(checkpoint, TextEncoderConfig)
    return fill(build_on_meta(lambda: UMT5Encoder(config)), checkpoint, device, dtype, done=done)


def load_tokenizer(path: str | Path, text_len: int, vocab: int) -> PromptTokenizer:
    """Load the tokenizer of a text encoder with `vocab` embeddings.

    Raises WeightsError for a file that is no tokenizer, or that of another encoder: ids beyond the embeddings, or so
    few that most embeddings would go unused. (Encoders round their vocabulary up, so the two are rarely equal.)
    """
    tokenizer = PromptTokenizer.from_file(path, text_len)
    if belong_together(tokenizer.vocab_size, vocab):
        return tokenizer
    raise WeightsError(
        f"{path}: a tokenizer of {tokenizer.vocab_size} tokens; the text encoder has {vocab} embeddings: not its own"
    )


def belong_together(tokens: int, embeddings: int) -> bool:
    """Whether a tokenizer of so many tokens can be the one that an encoder with so many embeddings learned with."""
    return tokens <= embeddings < USED_EMBEDDINGS * tokens


def build_on_meta(build: Callable[[], Module]) -> Module:
    """Build a module without memory for its parameters, ready for `fill`."""
    with _SkipInitialisation(), torch.device("meta"):
        return build()


class _SkipInitialisation(TorchFunctionMode):
    """Leaves tensors on meta alone that `torch.nn.init` would fill.

    They hold nothing, but the first fill would import torch's Python kernels for meta: a second and 70 MB.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if getattr(function, "__name__", "") in _FILLS and isinstance(target, Tensor) and target.is_meta:
            return target
        return function(*args, **kwargs)


_FILLS = {"uniform_", "normal_", "kaiming_uniform_", "constant_", "fill_", "zero_"}


def fill(
    module: Module,
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    slicer: Slicer | None = None,
    done: Callable[[int, int], None] = lambda count, of: None,
) -> Module:
    """Give a module built on meta its weights; returned in eval mode, without gradients.

    Args:
        module: parameters under original names. With a slicer its shapes are those of the slices.
        checkpoint: what to read.
        device, dtype: where and how the parameters end up; those of `precision.py` stay fp32.
        slicer: which part of each tensor to read, for a rank of a sharded model.
        done: hears after each tensor how many values are read, and of how many.

    Weights of `Fp8Linear` layers are quantised as each is read, from fp32: no more than one is there in full.

    Raises:
        WeightsError: tensors missing, extra, misshapen, not floating point, or with NaN or Inf.
    """
    quantised = _fp8_weights(module)
    scales = set(quantised.values())
    expected = {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in scales
    }
    wanted = describe_sizes(checkpoint.kind, getattr(module, "config", None))
    check_shapes(checkpoint, expected, slicer, wanted)
    logger.info("%s: loading %s on %s as %s", checkpoint.path, checkpoint.describe(), device, dtype)
    reader = _Reader(checkpoint, torch.device(device))
    kind = checkpoint.kind
    state: dict[str, Tensor] = {}
    count, of = 0, sum(map(math.prod, expected.values()))
    for name, shape in expected.items():
        if name in quantised:
            state[name], state[quantised[name]] = quantised_weight(reader.read(name, torch.float32, slicer))
        else:
            state[name] = reader.read(name, stored_dtype(kind, name, dtype), slicer)
        done(count := count + math.prod(shape), of)
    reader.raise_if_not_finite()
    module.load_state_dict(state, strict=True, assign=True)
    _refuse_meta(module)
    return module.eval().requires_grad_(False)


def _fp8_weights(module: nn.Module) -> dict[str, str]:
    """Names of the weights to quantise, each with the name of its scales."""
    layers = [name for name, layer in module.named_modules() if isinstance(layer, Fp8Linear)]
    return {f"{name}.weight": f"{name}.weight_scale" for name in layers}


def check_shapes(
    checkpoint: Checkpoint,
    expected: Mapping[str, Shape],
    slicer: Slicer | None = None,
    wanted: str = "the model",
) -> None:
    """Raise WeightsError unless the checkpoint has exactly these tensors; the first ten findings are listed.

    `wanted` describes the model that they are for.
    """
    got = checkpoint.shapes()
    findings = [f"missing {name} {_list(shape)}" for name, shape in expected.items() if name not in got]
    findings += [f"extra {name} {_list(shape)}" for name, shape in got.items() if name not in expected]
    for name in expected.keys() & got.keys():
        index = slicer(name, got[name]) if slicer else None
        part = _sliced(got[name], index)
        if part != expected[name]:
            findings.append(f"{name} is {_list(part)}, expected {_list(expected[name])}")
    if findings:
        more = f" and {len(findings) - LISTED} more" if len(findings) > LISTED else ""
        listed = "; ".join(sorted(findings, key=_finding_order)[:LISTED])
        raise WeightsError(
            f"{checkpoint.path}: got {checkpoint.describe()}, which does not fit {wanted}: {listed}{more};"
            " `wanrt weights check` says which preset it fits"
        )


def expect_kind(checkpoint: Checkpoint, *kinds: Kind) -> Checkpoint:
    """The checkpoint itself, or WeightsError naming what it is instead."""
    if checkpoint.kind in kinds:
        return checkpoint
    names = ", ".join(sorted(checkpoint.names)[:3])
    raise WeightsError(
        f"{checkpoint.path}: got {checkpoint.describe()} ({names}...); expected a {' or '.join(kinds)}"
    )


def check_finite(checkpoint: Checkpoint) -> None:
    """Read every tensor and raise WeightsError where there is NaN or Inf. Keeps nothing."""
    reader = _Reader(checkpoint, torch.device("cpu"))
    for name in checkpoint.names:
        reader.read(name, torch.float32, None)
    reader.raise_if_not_finite()


class _Reader:
    """Reads tensors to one device and collects, without waiting for it, whether they were finite."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._finite: dict[str, Tensor] = {}

    def read(self, name: str, dtype: torch.dtype, slicer: Slicer | None) -> Tensor:
        stored = self.checkpoint.names[name]
        source: TensorSource = self.checkpoint.source
        if not source.dtype(stored).is_floating_point:
            raise WeightsError(
                f"{self.checkpoint.path}: {name} is {source.dtype(stored)}; expected floating-point weights"
                " (quantised checkpoints are not supported)"
            )
        index = None
        if slicer:
            # a tensor that is whole, too: touching the mapping would read what lies around it
            shape = source.shape(stored)
            index = slicer(name, shape) or (slice(None),) * len(shape)
        part = source.read(stored, index, pinned=self.device.type == "cuda")
        tensor = part.to(self.device).to(dtype)
        tensor = tensor.contiguous()
        self._finite[name] = is_finite(tensor)
        return tensor

    def raise_if_not_finite(self) -> None:
        """One wait for the device at the end, not one per tensor."""
        if not self._finite or torch.stack(list(self._finite.values())).all():
            return
        bad = [name for name, finite in self._finite.items() if not finite]
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise WeightsError(
            f"{self.checkpoint.path}: NaN or Inf in {len(bad)} tensors: {', '.join(bad[:LISTED])}{more};"
            " fetch the file again, or load it in a wider dtype"
        )


def is_finite(tensor: Tensor) -> Tensor:
    """0-dim bool tensor on the tensor's device: no NaN, no Inf. One pass, no temporary of the tensor's size."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.aminmax()  # NaN wins in both
    return low.isfinite() & high.isfinite()


def _sizes(checkpoint: Checkpoint, kind: type[Sizes]) -> Sizes:
    if isinstance(checkpoint.config, kind):
        return checkpoint.config
    raise WeightsError(f"{checkpoint.path}: {checkpoint.describe()}; its shapes do not make a model")


def _sliced(shape: Shape, index: Index | None) -> Shape:
    return shape if index is None else sliced_shape(shape, index)


def _finding_order(finding: str) -> tuple[int, str]:
    """Missing first, then wrong shapes, then extra: the order in which they explain each other."""
    return ({"missing": 0, "extra": 2}.get(finding.split(" ", 1)[0], 1), finding)


def _refuse_meta(module: nn.Module) -> None:
    """Buffers outside the state dict stay on meta if a module makes them in __init__: our own mistake, so say it."""
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers outside the state dict were left on meta: {left[:3]}"


def _list(shape: Shape) -> str:
    return str(list(shape))
