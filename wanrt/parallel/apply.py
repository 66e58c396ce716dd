"""A plan applied to an untouched transformer, from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from wanrt.models.fp8 import Room
from wanrt.models.memory import CachedMemory, Memory
from wanrt.models.transformer import RMSNorm, SelfAttention, WanTransformer
from wanrt.parallel.fused_exchange import FusedExchange
from wanrt.parallel.peers import Peers, SharedBuffers
from wanrt.parallel.plan import ShardPlan, Slicer, Style
from wanrt.parallel.tensor import RowParallelLinear, fused_elementwise, spread_elementwise
from wanrt.parallel.topology import MeshKind
from wanrt.parallel.ulysses import PeerMemory, UlyssesAttention, UlyssesMemory, UlyssesTransformer

log = logging.getLogger("wanrt.parallel")


def apply(
    model: WanTransformer, plan: ShardPlan, group: ProcessGroup, peers: Peers | None = None
) -> WanTransformer | UlyssesTransformer:
    """Split `model` over `group`: modules are replaced in place, parameter names stay.

    Works on a model built on meta (fill it afterwards, with `plan.slicer(group.rank())`) and on one with weights,
    of which this rank keeps its part. Its `KVCache` needs `heads=plan.local_heads(config.num_heads)`. Returns what
    to call instead of the model. Only inference: the collectives have no gradients.

    peers: of `group`, where its ranks share memory: under Ulysses the KV cache must be in it. None: exchanges by the
    group's collectives.

    Raises `ValueError` when group and plan differ in size.
    """
    if group.size() != plan.size:
        raise ValueError(f"mesh of {group.size()} ranks, expected {plan.size}, the plan's size")
    if plan.kind is MeshKind.TP:
        return _split_weights(model, plan, group, _exchange(model, peers))
    if plan.kind is MeshKind.ULYSSES:
        return _share_tokens(model, group, peers)
    return model


def _exchange(model: WanTransformer, peers: Peers | None) -> FusedExchange | None:
    if peers is not None and not model.config.cross_attn_norm:
        log.warning(
            "exchanges: by collectives (no norm before cross-attention that could sum partial products)"
        )
        return None
    return None if peers is None else FusedExchange(peers, model.elementwise)


def _split_weights(
    model: WanTransformer, plan: ShardPlan, group: ProcessGroup, exchange: FusedExchange | None
) -> WanTransformer:
    slicer = plan.slicer(group.rank())
    room = None if exchange is None else exchange.room
    for name, module in list(model.named_modules()):
        rule = plan.rule(name)
        if rule is not None:
            weight, bias = (_part(module, name, leaf, slicer) for leaf in ("weight", "bias"))
            assert weight is not None
            model.set_submodule(name, _replacement(rule.style, weight, bias, group, room))
    if exchange is None:
        model.elementwise = spread_elementwise(model.elementwise, group)
    else:
        model.elementwise = fused_elementwise(exchange)
    return model


def _part(module: nn.Module, name: str, leaf: str, slicer: Slicer) -> Tensor | None:
    """This rank's part of a parameter, a copy: a view would keep the whole in memory."""
    whole = getattr(module, leaf, None)
    if whole is None:
        return None
    index = slicer(f"{name}.{leaf}", tuple(whole.shape))
    return whole.detach() if index is None else whole.detach()[index].clone()


def _replacement(
    style: Style, weight: Tensor, bias: Tensor | None, group: ProcessGroup, room: Room | None
) -> nn.Module:
    if style is Style.ROW:
        return RowParallelLinear(weight, bias, group, room)
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
        reach = partial(PeerMemory, peers=peers, buffers=SharedBuffers(peers))
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention):
            model.set_submodule(name, UlyssesAttention(module, reach))
    return UlyssesTransformer(model, group)
