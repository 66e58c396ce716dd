"""Small models and checkpoint files in every public format."""

from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wanrt.models.text_encoder import TextEncoderConfig, UMT5Encoder
from wanrt.models.transformer import TransformerConfig, WanTransformer
from wanrt.models.vae import VaeConfig, WanVae
from wanrt.weights.names import Kind, from_original, other_naming

TRANSFORMER = TransformerConfig(dim=256, ffn_dim=96, num_layers=2, num_heads=2, text_dim=48, text_len=16)
VAE = VaeConfig(base_dim=4, num_res_blocks=1)
TEXT = TextEncoderConfig(vocab=50, dim=48, attn_dim=32, ffn_dim=64, num_heads=4, num_layers=2)
BUILDERS = {
    Kind.TRANSFORMER: lambda: WanTransformer(TRANSFORMER),
    Kind.VAE: lambda: WanVae(VAE),
    Kind.TEXT_ENCODER: lambda: UMT5Encoder(TEXT),
}


class Zoo:
    """Random models of each kind, and ways to write them."""

    kinds = tuple(BUILDERS)
    configs: ClassVar = {Kind.TRANSFORMER: TRANSFORMER, Kind.VAE: VAE, Kind.TEXT_ENCODER: TEXT}

    def model(self, kind: Kind) -> nn.Module:
        torch.manual_seed(0)
        return BUILDERS[kind]().eval().requires_grad_(False)

    def state(self, kind: Kind, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {name: t.detach().to(dtype) for name, t in self.model(kind).state_dict().items()}

    def foreign_state(self, kind: Kind) -> dict[str, torch.Tensor]:
        """The state under the kind's other public names."""
        state = self.state(kind)
        names = from_original(state, kind, other_naming(kind))
        return {names[name]: tensor for name, tensor in state.items()}

    def shard(self, state: dict[str, torch.Tensor], directory, stem: str = "model"):
        """Write two shards and an index, as Hugging Face does; returns the index."""
        import json

        names = sorted(state)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        weight_map = {}
        for i, half in enumerate(halves, 1):
            file = f"{stem}-{i:05d}-of-00002.safetensors"
            save_file({n: state[n].contiguous() for n in half}, directory / file)
            weight_map |= dict.fromkeys(half, file)
        index = directory / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return index


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()
