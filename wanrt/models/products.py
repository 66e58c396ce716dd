"""Fewer and larger matrix products, for CUDA: applied from outside to a transformer that has its weights.

- q, k and v of a self-attention read the same tokens: one product with three times the outputs fills the
  multiprocessors in whole waves where three leave the last one half empty (14B at 2160 tokens, tiles of 128x256:
  3 x 3 waves, 86 % full, against 8, 97 % full), and reads its input once.
- The feed-forward's GELU is done where its first product's sums still are, in fp32, before they are rounded and
  written: one pass over the widest activation less.
- Cross-attention's last product adds onto the residual, whose update has no gate, instead of writing an update that the
  next norm adds: two passes over the tokens less. Its bias is added by the norm before, which writes the residual.

Parameters keep their names and values; q, k and v become views of one tensor. Sharded models (tensor-parallel slices,
Ulysses) are joined like whole ones; products in fp8 are joined too, and keep their own GELU, which quantises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanrt.models.fp8 import Fp8Linear
from wanrt.models.transformer import Block, SelfAttention


class LinearGelu(nn.Linear):
    """A linear layer and a tanh GELU as one product (cuBLASLt's GELU_BIAS epilogue), for inference on CUDA."""

    @classmethod
    def of(cls, layer: nn.Linear) -> LinearGelu:
        """Around the parameters of a layer with a bias."""
        with torch.device("meta"):
            fused = cls(layer.in_features, layer.out_features)
        fused.weight, fused.bias = layer.weight, layer.bias
        return fused

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


def join_projections(model: nn.Module) -> int:
    """One product for q, k and v in every self-attention whose three have the same form. Gives how many."""
    joined = 0
    for module in model.modules():
        if isinstance(module, SelfAttention):
            product = _joined((module.q, module.k, module.v))
            if product is not None:
                module.joined = (product,)
                joined += 1
    return joined


def fuse_gelu(model: nn.Module) -> int:
    """`LinearGelu` for every linear layer that a tanh GELU follows in a feed-forward. Gives how many."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential) and name.endswith(".ffn") and _takes_gelu(module)
    ]
    for name in found:
        first = model.get_submodule(f"{name}.0")
        assert isinstance(first, nn.Linear)
        model.set_submodule(f"{name}.0", LinearGelu.of(first))
        model.set_submodule(f"{name}.1", nn.Identity())
    return len(found)


def add_onto_residuals(model: nn.Module) -> int:
    """Cross-attention onto the residual in every block where its last product is a plain one. Gives how many.

    A sharded product is none: it has a part of a sum. Blocks without a norm in front of cross-attention, or with one
    that quantises, have nobody to add the bias.
    """
    found = [block for block in model.modules() if isinstance(block, Block) and _takes_residual(block)]
    for block in found:
        block.cross_attn.adds_onto = True
    return len(found)


def _takes_residual(block: Block) -> bool:
    attention = block.cross_attn
    return block.norm3 is not None and all(type(x) is nn.Linear for x in (attention.q, attention.o))


def _takes_gelu(ffn: nn.Sequential) -> bool:
    first, activation = ffn[0], ffn[1]
    plain = type(first) is nn.Linear and first.bias is not None
    return plain and isinstance(activation, nn.GELU) and activation.approximate == "tanh"


def _joined(layers: tuple[nn.Module, ...]) -> nn.Module | None:
    """The layers as one, of whose parameters theirs become views; None where they differ in form."""
    first = layers[0]
    if type(first) not in (nn.Linear, Fp8Linear) or any(
        type(layer) is not type(first) or layer.bias is None or _shape(layer) != _shape(first)
        for layer in layers
    ):
        return None
    outputs, inputs = _shape(first)
    size = (len(layers) * outputs, inputs)
    if isinstance(first, Fp8Linear):
        product: nn.Module = Fp8Linear(size, bias=True, product=first.product, device="meta")
    else:
        product = nn.Linear(inputs, size[0], device="meta")
    for name, _ in first.named_parameters():
        _share(product, name, layers)
    return product


def _shape(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def _share(product: nn.Module, name: str, layers: tuple[nn.Module, ...]) -> None:
    """One tensor for a parameter of all, of which each gets its part."""
    own = [layer.get_parameter(name).detach() for layer in layers]
    whole = own[0].new_empty(sum(part.shape[0] for part in own), *own[0].shape[1:])
    setattr(product, name, nn.Parameter(whole, requires_grad=False))
    for layer, part, mine in zip(layers, whole.chunk(len(layers)), own, strict=True):
        setattr(layer, name, nn.Parameter(part.copy_(mine), requires_grad=False))
