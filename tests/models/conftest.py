"""Transformers of a few thousand parameters, every parameter random (norms, biases and modulation too)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wanrt.models.transformer import CachePolicy, KVCache, TransformerConfig, WanTransformer

SMALL = {
    "dim": 40,
    "ffn_dim": 80,
    "num_layers": 2,
    "num_heads": 2,
    "text_dim": 20,
    "text_len": 7,
    "freq_dim": 32,
}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Matrices that keep the scale of what goes through, everything else away from zero and one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("weight") and p.ndim > 1:
            p.data = noise * (1.3 / p[0].numel() ** 0.5)
        else:
            p.data = noise * 0.3 + (1.0 if name.endswith("weight") else 0.0)


@pytest.fixture
def make_transformer() -> Callable[..., WanTransformer]:
    def make(seed: int = 0, **changes: Any) -> WanTransformer:
        model = WanTransformer(TransformerConfig(**{**SMALL, **changes}))
        randomise(model, seed)
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture
def make_cache() -> Callable[..., KVCache]:
    def make(model: WanTransformer, policy: CachePolicy = CachePolicy.RECOMPUTE, **changes: Any) -> KVCache:
        kwargs = {"frames": 3, "grid": (2, 3), **changes}
        return KVCache.allocate(model.config, policy=policy, **kwargs)

    return make
