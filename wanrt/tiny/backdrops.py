"""The backgrounds of the toy world: two painted layers each, larger than the frame, for a drifting camera.

Coordinates: `u` right and `v` down from the frame's centre, in frame heights. Colours are RGB in 0..1.
Layout is fixed per background, so that a background is one picture that only drifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 0.14
"""How far a layer reaches beyond the frame on every side, in frame heights."""

SUPERSAMPLE = 3
"""Layers are painted this many times finer per axis and then averaged."""

RGB = tuple[int, int, int]


def _rgb(c: RGB, like: Tensor) -> Tensor:
    return torch.tensor(c, dtype=like.dtype).div(255)[:, None, None]


def _gradient(v: Tensor, stops: list[tuple[float, RGB]]) -> Tensor:
    """`[3, h, w]`: colours interpolated down the frame between (v, colour) stops."""
    out = _rgb(stops[0][1], v).expand(3, *v.shape)
    for (v0, _), (v1, c1) in pairwise(stops):
        out = torch.lerp(out, _rgb(c1, v).expand_as(out), ((v - v0) / (v1 - v0)).clamp(0, 1))
    return out


class _Layer:
    """A picture under construction: RGB and alpha, painted back to front."""

    def __init__(self, rgb: Tensor, alpha: Tensor) -> None:
        self.rgb, self.alpha = rgb, alpha

    def paint(self, colour: RGB | Tensor, cover: Tensor) -> None:
        c = colour if isinstance(colour, Tensor) else _rgb(colour, cover)
        cover = cover.clamp(0, 1)
        self.rgb = torch.lerp(self.rgb, c.expand_as(self.rgb), cover)
        self.alpha = self.alpha + (1 - self.alpha) * cover


def _edge(d: Tensor, soft: float = 0.004) -> Tensor:
    """Coverage of the region where `d` < 0, with a soft rim."""
    return (0.5 - d / soft).clamp(0, 1)


def _blob(u: Tensor, v: Tensor, x: float, y: float, rx: float, ry: float) -> Tensor:
    return _edge(torch.hypot((u - x) / rx, (v - y) / ry) - 1, 0.08)


def _cloud(layer: _Layer, u: Tensor, v: Tensor, x: float, y: float, s: float, c: RGB) -> None:
    for dx, dy, r in ((-0.10, 0.02, 0.06), (0.0, -0.01, 0.09), (0.11, 0.02, 0.065), (0.02, 0.035, 0.10)):
        layer.paint(c, _blob(u, v, x + s * dx, y + s * dy, s * r * 1.2, s * r * 0.8))


def _peaks(u: Tensor, points: list[tuple[float, float]]) -> Tensor:
    """The height line through (u, v) points, straight between them."""
    line = torch.full_like(u, points[0][1])
    for (x0, y0), (x1, y1) in pairwise(points):
        line = torch.where(u >= x0, y0 + (y1 - y0) * ((u - x0) / (x1 - x0)).clamp(max=1), line)
    return line


def _night(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (7, 10, 44)), (0.1, (22, 36, 104)), (0.5, (58, 76, 158))])
    g = torch.Generator().manual_seed(5)
    for x, y, s in torch.rand(46, 3, generator=g).tolist():
        r = 0.006 + 0.009 * s * s
        glow = torch.exp(-((u - (x - 0.5) * 2.1) ** 2 + (v + 0.64 - y * 0.95) ** 2) / (r * r))
        far.paint((255, 250, 225), glow * (0.65 + 0.35 * s))
    near.paint((12, 17, 42), _edge(0.37 - 0.05 * torch.sin(u * 4.1 + 1) - 0.03 * torch.sin(u * 9 + 2) - v))


def _sunset(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    stops = [(-0.6, (78, 42, 118)), (-0.2, (190, 66, 116)), (0.08, (250, 130, 70)), (0.24, (255, 205, 110))]
    far.rgb = _gradient(v, stops)
    halo = torch.exp(-(torch.hypot(u - 0.42, v - 0.2) ** 2) / 0.05)
    far.paint((255, 225, 140), halo * 0.7)
    far.paint((255, 246, 190), _edge(torch.hypot(u - 0.42, v - 0.2) - 0.14))
    for y, x in ((-0.30, -0.3), (-0.18, 0.35), (-0.06, -0.5)):
        far.paint((255, 150, 120), 0.65 * _blob(u, v, x, y, 0.34, 0.018))
    near.paint(_gradient(v, [(0.24, (205, 92, 84)), (0.55, (88, 34, 84))]), _edge(0.24 - v))
    for i, y in enumerate((0.27, 0.31, 0.36, 0.42)):
        near.paint((255, 200, 120), 0.8 * _blob(u, v, 0.42, y, 0.13 + 0.03 * i, 0.009 + 0.001 * i))


def _ocean(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (96, 186, 240)), (0.05, (205, 238, 252))])
    _cloud(far, u, v, -0.48, -0.27, 1.1, (255, 255, 255))
    _cloud(far, u, v, 0.50, -0.33, 0.9, (255, 255, 255))
    near.paint(_gradient(v, [(0.04, (34, 132, 200)), (0.55, (8, 62, 140))]), _edge(0.04 - v))
    for i, y in enumerate((0.11, 0.20, 0.31, 0.44)):
        wave = v - y - 0.014 * (1 + i * 0.4) * torch.sin(u * (13 - 2 * i) + i * 1.9)
        near.paint((178, 226, 246), 0.75 * _edge(wave.abs() - 0.006 - 0.0015 * i, 0.006))


def _meadow(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (84, 168, 245)), (0.15, (200, 232, 255))])
    _cloud(far, u, v, 0.30, -0.30, 1.2, (255, 255, 255))
    _cloud(far, u, v, -0.60, -0.20, 0.8, (255, 255, 255))
    far.paint((110, 190, 100), _edge(0.12 - 0.06 * torch.sin(u * 3 + 0.6) - v))
    near.paint(
        _gradient(v, [(0.1, (110, 205, 72)), (0.55, (44, 140, 44))]),
        _edge(0.22 + 0.05 * torch.sin(u * 2.6 + 2.2) - v),
    )
    g = torch.Generator().manual_seed(11)
    for i, (x, y) in enumerate(torch.rand(30, 2, generator=g).tolist()):
        c = ((255, 255, 255), (255, 225, 70), (250, 120, 150))[i % 3]
        near.paint(c, _blob(u, v, (x - 0.5) * 2.1, 0.31 + 0.3 * y, 0.014, 0.014))


def _desert(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (128, 202, 214)), (0.12, (252, 232, 190))])
    far.paint((255, 250, 215), _edge(torch.hypot(u + 0.55, v + 0.30) - 0.085))
    far.paint((214, 158, 104), _edge(0.14 - 0.05 * torch.sin(u * 2.3 - 0.4) - v))
    near.paint((236, 186, 112), _edge(0.22 - 0.07 * torch.sin(u * 2.9 + 2.4) - v))
    near.paint((210, 148, 82), _edge(0.38 - 0.05 * torch.sin(u * 3.4 + 0.2) - v))
    for x, y, s in ((-0.66, 0.22, 1.0), (0.70, 0.26, 0.8)):
        for cx, cy, w, h in (
            (0, 0, 0.024, 0.13),
            (-0.07, -0.02, 0.018, 0.05),
            (0.07, -0.05, 0.018, 0.05),
            (-0.035, 0.025, 0.05, 0.018),
            (0.035, 0.0, 0.05, 0.018),
        ):
            dx, dy = (u - x - s * cx).abs() - s * w * 0.8, (v - y - s * cy).abs() - s * h * 0.8
            near.paint((58, 120, 72), _edge(torch.maximum(dx, dy) - 0.004))


def _mountains(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (120, 172, 226)), (0.2, (226, 238, 248))])
    ridge = _peaks(
        u, [(-1.3, 0.2), (-0.86, -0.16), (-0.5, 0.10), (-0.1, -0.32), (0.34, 0.06), (0.7, -0.22), (1.3, 0.25)]
    )
    far.paint((92, 112, 150), _edge(ridge - v))
    jag = 0.03 * torch.asin(torch.sin(u * 26)).abs()
    far.paint((250, 252, 255), _edge(ridge - v) * _edge(v - ridge - 0.10 - jag) * _edge(v - 0.02))
    far.paint((126, 146, 180), _edge(ridge - v) * _edge((u + 0.1) % 0.8 - 0.25) * 0.35)
    near.paint((236, 243, 250), _edge(0.24 - 0.05 * torch.sin(u * 2.4 + 1) - v))
    near.paint((206, 220, 238), _edge(0.40 - 0.03 * torch.sin(u * 3.2 + 3) - v))


def _city(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (38, 30, 84)), (0.0, (120, 62, 142)), (0.4, (236, 138, 150))])
    g = torch.Generator().manual_seed(23)
    tall = torch.rand(2, 16, generator=g).tolist()
    for layer, heights, c, base, width in (
        (far, tall[0], (74, 52, 116), 0.10, 0.19),
        (near, tall[1], (26, 26, 62), 0.26, 0.17),
    ):
        for i, h in enumerate(heights):
            x, top = (i - 7.5) * width, base - 0.26 * h
            cover = _edge(torch.maximum((u - x).abs() - width * 0.40, top - v))
            layer.paint(c, cover)
            if layer is near:
                wx = ((u - x + 10) % 0.05 - 0.025).abs() - 0.011
                wy = ((v - top + 10) % 0.066 - 0.033).abs() - 0.015
                inner = torch.maximum((u - x).abs() - width * 0.30, top + 0.015 - v)
                lit = (torch.floor((u - x) / 0.05) * 3 + torch.floor((v - top) / 0.066) * 5 + i) % 4 < 2.5
                layer.paint((255, 214, 110), _edge(torch.maximum(torch.maximum(wx, wy), inner)) * lit)


def _forest(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (196, 226, 196)), (0.4, (138, 190, 150))])
    rows = (
        (far, 0.19, -0.10, (108, 166, 126), 0.0),
        (far, 0.24, 0.04, (62, 124, 88), 0.07),
        (near, 0.30, 0.20, (18, 70, 50), 0.15),
    )
    for layer, width, top, c, shift in rows:
        x = (u + shift + 10) % width - width / 2
        number = torch.floor((u + shift + 10) / width)
        tip = top - 0.06 * torch.sin(number * 2.4)
        y = v - tip
        tier = (y % 0.13) * 0.55 + torch.floor(y / 0.13) * 0.034
        layer.paint(c, _edge(torch.maximum(x.abs() - tier - 0.004, -y)))
        layer.paint(c, _edge(top + 0.34 - v))
    near.paint((12, 50, 38), _edge(0.43 - 0.02 * torch.sin(u * 5) - v))


def _underwater(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (70, 214, 208)), (0.0, (14, 132, 158)), (0.5, (6, 60, 98))])
    for x, w in ((-0.6, 0.10), (-0.15, 0.07), (0.3, 0.12), (0.72, 0.07)):
        ray = (u - x + (v + 0.6) * 0.35).abs() - w * (0.5 + (v + 0.6))
        far.paint((190, 255, 240), 0.22 * _edge(ray, 0.05) * (0.6 - v).clamp(0, 1))
    near.paint((226, 200, 140), _edge(0.40 + 0.025 * torch.sin(u * 5.0) - v))
    for x, h, c in (
        (-0.74, 0.34, (30, 150, 92)),
        (-0.62, 0.22, (240, 110, 110)),
        (0.60, 0.24, (240, 150, 70)),
        (0.72, 0.38, (24, 130, 90)),
        (0.82, 0.28, (30, 150, 92)),
    ):
        sway = (u - x - 0.018 * torch.sin(v * 22 + x * 9)).abs() - 0.020
        near.paint(c, _edge(torch.maximum(sway, 0.44 - h - v)) * _edge(v - 0.45))
    for x, y, r in ((-0.45, -0.2, 0.022), (-0.40, -0.32, 0.016), (0.52, -0.1, 0.024), (0.56, -0.27, 0.017)):
        near.paint((205, 250, 248), 0.8 * _edge((torch.hypot(u - x, v - y) - r).abs() - 0.005, 0.006))


def _plain(u: Tensor, v: Tensor, far: _Layer, near: _Layer) -> None:
    far.rgb = _gradient(v, [(-0.6, (214, 219, 230)), (0.28, (240, 242, 247))])
    near.paint(_gradient(v, [(0.30, (196, 202, 216)), (0.6, (226, 229, 237))]), _edge(0.30 - v, 0.02))


_PAINTERS: dict[str, Callable[[Tensor, Tensor, _Layer, _Layer], None]] = {
    "night": _night,
    "sunset": _sunset,
    "ocean": _ocean,
    "meadow": _meadow,
    "desert": _desert,
    "mountains": _mountains,
    "city": _city,
    "forest": _forest,
    "underwater": _underwater,
    "plain": _plain,
}


def paint(name: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """One background for frames of `height` x `width` pixels.

    Returns the far layer RGB and the near layer premultiplied RGBA, `[4, h, w]` each (the far layer's alpha
    is 1), with `margin(height)` pixels more than the frame on every side.
    """
    m, s = margin(height), SUPERSAMPLE
    rows, columns = (height + 2 * m) * s, (width + 2 * m) * s
    v, u = torch.meshgrid(
        (torch.arange(rows) + 0.5) / (s * height) - 0.5 - m / height,
        (torch.arange(columns) + 0.5) / (s * height) - (width / 2 + m) / height,
        indexing="ij",
    )
    far = _Layer(torch.zeros(3, rows, columns), torch.ones(1, rows, columns))
    near = _Layer(torch.zeros(3, rows, columns), torch.zeros(1, rows, columns))
    _PAINTERS[name](u, v, far, near)
    premultiplied = torch.cat([near.rgb * near.alpha.clamp(0, 1), near.alpha])
    both = torch.cat([far.rgb, torch.ones(1, rows, columns), premultiplied])
    far_small, near_small = F.avg_pool2d(both, s).split(4)
    return far_small, near_small


def margin(height: int) -> int:
    """Pixels that a layer reaches beyond the frame on every side."""
    return math.ceil(MARGIN * height)
