"""Random weights, drawn on the device: for benchmarks of models that are not on this disk."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from wanrt.weights.names import identify_names
from wanrt.weights.precision import stored_dtype
from wanrt.weights.sources import Index, TensorSource

logger = logging.getLogger("wanrt.weights")

Module = TypeVar("Module", bound=nn.Module)

# Width of a head of UMT5. T5's attention has no 1/sqrt(C); its queries start smaller by that factor instead
# (Wan-Video/Wan2.1 wan/modules/t5.py `init_weights` at 9737cba).
_UMT5_HEAD_WIDTH = 64


def random_weights(
    module: Module, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Module:
    """Fill a module built on meta with seeded noise at scales that keep activations alive through 40 layers.

    A tensor depends on (seed, its name, its shape, device type) alone: not on the order of the others. Ranks of a
    sharded model get the very slices with `fill(module, identify(RandomSource(full shapes, ...)), slicer=...)`.
    Touches no disk. Returned in eval mode.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    source = RandomSource(shapes, seed, device, dtype)
    logger.info("random weights, seed %d: for benchmarks only", seed)
    module.load_state_dict({name: source.read(name) for name in shapes}, strict=True, assign=True)
    return module.eval().requires_grad_(False)


class RandomSource(TensorSource):
    """A checkpoint of noise, made as it is read."""

    path = Path("<random weights>")

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._device = torch.device(device)
        kind, _ = identify_names(shapes)
        self._dtypes = {name: stored_dtype(kind, name, dtype) for name in shapes}

    def names(self) -> Sequence[str]:
        """See TensorSource."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """See TensorSource."""
        return self._dtypes[name]

    def read(self, name: str, index: Index | None = None, *, pinned: bool = False) -> Tensor:
        """Draw the whole tensor on the device, then take the slice: equal to the slice of another rank's tensor."""
        mean, std = _scale(name, self._shapes[name])
        tensor = torch.full(self._shapes[name], mean, dtype=self._dtypes[name], device=self._device)
        if std:
            generator = torch.Generator(self._device).manual_seed(_tensor_seed(self._seed, name))
            tensor.normal_(mean, std, generator=generator)
        return tensor if index is None else tensor[index].clone()


def _tensor_seed(seed: int, name: str) -> int:
    """63 bits from (seed, name): neighbouring seeds and names share nothing."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor: 1/sqrt(fan_in) keeps the size of what passes through a layer.

    Norms start at 1, biases at 0, embeddings at O(1), and AdaLN tables at 1/sqrt(dim), as in Wan-Video/Wan2.1
    wan/modules/model.py `WanAttentionBlock` at 9737cba.
    """
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return 0.0, 0.0
    if leaf == "gamma" or len(shape) < 2:  # norms: every one-dimensional weight of these models
        return 1.0, 0.0
    if leaf == "modulation":
        return 0.0, shape[-1] ** -0.5
    if fnmatchcase(name, "*pos_embedding*") or fnmatchcase(name, "token_embedding*"):
        return 0.0, 1.0
    std = math.prod(shape[1:]) ** -0.5
    return 0.0, std * _UMT5_HEAD_WIDTH**-0.5 if fnmatchcase(name, "blocks.*.attn.q.weight") else std
