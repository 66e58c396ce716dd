"""The objects of the toy world as signed-distance tables.

Formulas for the distances follow Inigo Quilez, "2D distance functions"
(https://iquilezles.org/articles/distfunctions2d/), written anew; distances are in object radii, negative
inside. A table is sampled once per shape and device and read with bilinear interpolation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TABLE = 192
"""Samples of a table per axis."""

EXTENT = 2.0
"""A table spans -EXTENT..EXTENT object radii."""


def _box(x: Tensor, y: Tensor, hx: float, hy: float) -> Tensor:
    dx, dy = x.abs() - hx, y.abs() - hy
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0)


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Distance to a closed polygon by edges; the sign is by the even-odd rule."""
    best = torch.full_like(x, 1e9)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        best = torch.minimum(best, torch.hypot(wx - ex * t, wy - ey * t))
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ex * (y - ay) / (ey if ey else 1e-9) + ax)
    return torch.where(inside, -best, best)


def _ring_points(n: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """`n` points around the centre from the top, their radii cycling."""
    angles = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def _heart(x: Tensor, y: Tensor) -> Tensor:
    ts = [2 * math.pi * i / 72 for i in range(72)]
    px = [16 * math.sin(t) ** 3 for t in ts]
    py = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    return _polygon(x, y, [(a / 16.0, -(b + 2.5) / 16.0) for a, b in zip(px, py, strict=True)])


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    """A polygon of two arcs: the outer circle around (-0.1, 0), the bite around (0.4, 0)."""
    tip = (0.62, math.sqrt(1.0 - 0.72**2))  # on both circles; the arcs run from one tip to the other
    bite = math.hypot(tip[0] - 0.4, tip[1])
    start, turn = math.atan2(tip[1], tip[0] + 0.1), math.atan2(tip[1], tip[0] - 0.4)
    steps = [i / 40 for i in range(41)]
    outer = [start + (2 * math.pi - 2 * start) * t for t in steps]
    inner = [-turn - (2 * math.pi - 2 * turn) * t for t in steps[1:-1]]
    arc = [(math.cos(a) - 0.1, math.sin(a)) for a in outer]
    return _polygon(x, y, arc + [(0.4 + bite * math.cos(a), bite * math.sin(a)) for a in inner])


def distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of shape `name` at object coordinates (x right, y down), in object radii."""
    if name == "ball":
        return torch.hypot(x, y) - 0.92
    if name == "square":
        return _box(x, y, 0.74, 0.74) - 0.06
    if name == "triangle":
        return _polygon(x, y + 0.08, _ring_points(3, (1.08,))) - 0.05
    if name == "star":
        return _polygon(x, y, _ring_points(10, (1.1, 0.48))) - 0.03
    if name == "heart":
        return _heart(x, y) - 0.02
    if name == "ring":
        return (torch.hypot(x, y) - 0.70).abs() - 0.25
    if name == "cross":
        return torch.minimum(_box(x, y, 0.98, 0.30), _box(x, y, 0.30, 0.98)) - 0.03
    if name == "crescent":
        return _crescent(x, y) - 0.03
    raise ValueError(f"no shape is called {name!r}")


def tables(names: tuple[str, ...], device: torch.device | str) -> Tensor:
    """`[len(names), 2, TABLE, TABLE]`: distance, and shade in -1..1 that turns with the object.

    The shade is a beach-ball pattern on the round shapes, so that a spinning ball is seen to spin, and a
    soft gradient on the others.
    """
    axis = torch.linspace(-EXTENT, EXTENT, TABLE, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    sectors = (torch.sin(3 * torch.atan2(y, x)) * 6).clamp(-1, 1)
    slope = (-(x + y) * 0.45).clamp(-1, 1)
    rows = [torch.stack([distance(n, x, y), sectors if n in ("ball", "ring") else slope]) for n in names]
    return torch.stack(rows).float().to(device)
