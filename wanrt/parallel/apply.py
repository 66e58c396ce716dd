"""A plan applied to an untouched transformer, from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanrt.models.memory import CachedMemory, Memory
from wanrt.models.transformer import RMSNorm, SelfAttention, WanTransformer
from wanrt.parallel.peers import PeerRoom, Peers
from wanrt.parallel.plan import ShardPlan, Slicer, Style
from wanrt.parallel.tensor import RowParallelLinear, spread_elementwise
from wanrt.parallel.topology import MeshKind
from wanrt.parallel.ulysses import PeerMemory, UlyssesAttention, UlyssesMemory, UlyssesTransformer


def apply(
    model: WanTransformer, plan: ShardPlan, group: ProcessGroup, peers: Peers | None = None
) -> WanTransformer | UlyssesTransformer:
    """Split `model` over `group`: modules are replaced in place, parameter names stay.

    Works on a model built on meta (fill it afterwards, with `plan.slicer(group.rank())`) and on one with weights,
    of which this rank keeps its part. Its `KVCache` needs `heads=plan.local_heads(config.num_heads)`. Returns what
    to call instead of the model. Only inference: the collectives have no gradients.

    peers: the group's shared memory, in which then the KV cache must be; None: collectives exchange.

    Raises `ValueError` when group and plan differ in size.
    """
    if group.size() != plan.size:
        raise ValueError(f"mesh of {group.size()} ranks, expected {plan.size}, the plan's size")
    if plan.kind is MeshKind.TP:
        return _split_weights(model, plan, group)
    if plan.kind is MeshKind.ULYSSES:
        return _share_tokens(model, group, peers)
    return model


def _split_weights(model: WanTransformer, plan: ShardPlan, group: ProcessGroup) -> WanTransformer:
    slicer = plan.slicer(group.rank())
    for name, module in list(model.named_modules()):
        rule = plan.rule(name)
        if rule is not None:
            weight, bias = (_part(module, name, leaf, slicer) for leaf in ("weight", "bias"))
            assert weight is not None
            model.set_submodule(name, _replacement(rule.style, weight, bias, group))
    model.elementwise = spread_elementwise(model.elementwise, group)
    return model


def _part(module: nn.Module, name: str, leaf: str, slicer: Slicer) -> Tensor | None:
    """This rank's part of a parameter, a copy: a view would keep the whole in memory."""
    whole = getattr(module, leaf, None)
    if whole is None:
        return None
    index = slicer(f"{name}.{leaf}", tuple(whole.shape))
    return whole.detach() if index is None else whole.detach()[index].clone()


def _replacement(style: Style, weight: Tensor, bias: Tensor | None, group: ProcessGroup) -> nn.Module:
    if style is Style.ROW:
        return RowParallelLinear(weight, bias, group)
    return _smaller_norm(weight) if style is Style.NORM else _smaller_linear(weight, bias)


def _smaller_norm(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(0)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm


def _smaller_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around parameters that exist already."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _share_tokens(model: WanTransformer, group: ProcessGroup, peers: Peers | None) -> UlyssesTransformer:
    if peers is None:
        reach: Callable[[CachedMemory], Memory] = partial(UlyssesMemory, group=group)
    else:
        reach = partial(PeerMemory, room=PeerRoom(peers))
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention):
            model.set_submodule(name, UlyssesAttention(module, reach))
    return UlyssesTransformer(model, group)
