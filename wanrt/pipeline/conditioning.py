"""Prompt embeddings of a chunk: weighted blends of prompts and the way from one prompt to the next.

Embeddings are `[B, L, D]`, padding zeroed after the last token. Blending works token by token; a token that
exists in one prompt only blends with zero, linearly. Compare krea-ai/realtime-video release_server.py
(`interpolate_prompt_embeds`, lerp) at acf4b7b and daydreamlive/scope pipelines/blending.py (lerp, slerp) at
68b0f95; unlike there, slerp turns the direction and moves the length linearly, so that tokens of unlike
lengths do not swell.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from wanrt.errors import UsageError

if TYPE_CHECKING:
    import torch

# Below this sine of the angle (radians) the slerp weights lose their digits in float32, and lerp equals slerp
# anyway for near-parallel tokens; for near-opposite ones no arc is defined.
MIN_SINE = 1e-3


class Curve(StrEnum):
    """How embeddings blend: in a straight line, or along the arc between their directions."""

    LERP = "lerp"
    SLERP = "slerp"


def lerp(a: torch.Tensor, b: torch.Tensor, fraction: float) -> torch.Tensor:
    """(1 - fraction) a + fraction b, exact at both ends."""
    if fraction <= 0.0:
        return a
    if fraction >= 1.0:
        return b
    return (1.0 - fraction) * a + fraction * b


def slerp(a: torch.Tensor, b: torch.Tensor, fraction: float) -> torch.Tensor:
    """Token by token along the arc from `a` to `b` `[..., D]`, exact at both ends; lerp where no arc is
    defined.
    """
    import torch

    straight = lerp(a, b, fraction)
    if fraction <= 0.0 or fraction >= 1.0:
        return straight
    x, y = a.float(), b.float()
    norm_x, norm_y = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    unit_x, unit_y = x / norm_x.clamp_min(1e-12), y / norm_y.clamp_min(1e-12)
    cosine = (unit_x * unit_y).sum(dim=-1, keepdim=True).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    turned = (
        torch.sin((1.0 - fraction) * angle) * unit_x + torch.sin(fraction * angle) * unit_y
    ) / sine.clamp_min(MIN_SINE)
    arc = turned * lerp(norm_x, norm_y, fraction)
    defined = (sine > MIN_SINE) & (norm_x > 0) & (norm_y > 0)
    return torch.where(defined, arc.to(straight.dtype), straight)


def mix(a: torch.Tensor, b: torch.Tensor, fraction: float, curve: Curve | str) -> torch.Tensor:
    """The embedding `fraction` (0..1) of the way from `a` to `b` along `curve`."""
    return slerp(a, b, fraction) if Curve(curve) is Curve.SLERP else lerp(a, b, fraction)


def blend(
    embeddings: Sequence[torch.Tensor], weights: Sequence[float], curve: Curve | str = Curve.LERP
) -> torch.Tensor:
    """Weighted blend of embeddings; weights need not sum to 1. Along an arc, prompts join one after the
    other.

    Raises `UsageError` for no embedding, unlike counts, or weights that are negative or all zero.
    """
    if not embeddings or len(embeddings) != len(weights):
        raise UsageError(
            f"{len(embeddings)} prompts with {len(weights)} weights: give each prompt one weight"
        )
    if min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(f"prompt weights {list(weights)}: expected numbers >= 0, at least one above 0")
    result, total = embeddings[0], weights[0]
    for embedding, weight in zip(embeddings[1:], weights[1:], strict=True):
        total += weight
        if total > 0:
            result = mix(result, embedding, weight / total, curve)
    return result
