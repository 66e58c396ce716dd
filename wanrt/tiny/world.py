"""The toy world of wan-tiny: one large object moving over a painted background, 16 frames per second.

Everything is periodic in 48 frames (four chunks of 12), starts at fixed phases and carries little jitter:
twelve frames of context, the caption and the phase tell what comes next, so that four steps without
guidance are enough. Drawn in pure PyTorch on any device; a clip is a function of its scene alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wanrt.tiny import backdrops, shapes
from wanrt.tiny.scenes import BACKGROUNDS, MOTIONS, NO_OBJECT, SHAPES, Scenes

FPS = 16
PERIOD = 48
"""Frames after which every scene repeats: four chunks."""

PALETTE = torch.tensor(
    [
        (226, 38, 44),
        (250, 136, 16),
        (252, 222, 44),
        (46, 178, 66),
        (38, 84, 232),
        (138, 50, 196),
        (252, 128, 188),
        (246, 246, 246),
    ]
).div(255)
"""RGB of the object's colours, in the order of `scenes.COLOURS`."""

RADIUS = 0.21
"""The object's radius in frame heights: it is about 2/5 of the frame high."""

DRIFT = 0.030
"""Amplitude of the camera's drift, in frame heights; the far layer moves 0.4 of it."""

PIVOT = (0.0, -0.72)
"""Where the swinging object's string hangs, in frame heights from the centre."""


@dataclass(frozen=True)
class Placement:
    """Where the object is, `[N, T]` each: centre (frame heights), rotation (radians), scales, string."""

    x: Tensor
    y: Tensor
    angle: Tensor
    scale_x: Tensor
    scale_y: Tensor
    string: Tensor


def _motions(turn: Tensor, amount: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """x, y, angle, scale x, scale y of every motion at `turn` (cycles of PERIOD), scaled by `amount`."""
    w = 2 * math.pi * turn
    zero, one = torch.zeros_like(w), torch.ones_like(w)
    up = (turn * 2 + 0.5) % 1.0
    squash = torch.exp(-((torch.minimum(up, 1 - up) / 0.07) ** 2)) * 0.22
    bounce = 0.24 - 0.36 * amount * 4 * up * (1 - up)
    swing = 0.50 * amount * torch.cos(w)
    beat = 0.26 * amount * torch.sin(2 * w)
    table: dict[str, tuple[Tensor, ...]] = {
        "bouncing": (zero, bounce + 0.04 * squash, zero, 1 + 0.6 * squash, 1 - squash),
        "spinning": (zero, zero, w, one, one),
        "sliding": (0.46 * amount * torch.sin(w), zero, zero, one, one),
        "circling": (0.40 * amount * torch.cos(w), 0.20 * amount * torch.sin(w), zero, one, one),
        "pulsing": (zero, zero, zero, 1 + beat, 1 + beat),
        "swinging": (PIVOT[0] - 0.74 * torch.sin(swing), PIVOT[1] + 0.74 * torch.cos(swing), swing, one, one),
        "floating": (zero, 0.075 * amount * torch.sin(w), 0.10 * torch.cos(w), one, one),
    }
    if tuple(table) != MOTIONS:
        raise AssertionError("the table of motions and scenes.MOTIONS differ")
    return table


def place(scenes: Scenes, times: Tensor) -> Placement:
    """The object's placement at `times` `[T]` (frames since the video's start) for N scenes.

    Jitter (each -1..1): 0, 1 centre +-2 % of the height; 2 size +-4 %; 3 phase +-1.5 frames; 4 amount of
    motion +-4 %; 5 rotation +-3 degrees; 6, 7 camera offset.
    """
    j = scenes.jitter.to(torch.float32)
    turn = (times[None].to(torch.float32) + 1.5 * j[:, 3:4]) / PERIOD
    table = _motions(turn, 1 + 0.04 * j[:, 4:5])
    rows = torch.arange(len(scenes), device=j.device)
    chosen = [torch.stack([m[i] for m in table.values()])[scenes.motion, rows] for i in range(5)]
    x, y, angle, scale_x, scale_y = chosen
    size = RADIUS * (1 + 0.04 * j[:, 2:3])
    string = (scenes.motion == MOTIONS.index("swinging"))[:, None].expand_as(x).to(x.dtype)
    return Placement(
        x + 0.02 * j[:, 0:1],
        y + 0.02 * j[:, 1:2],
        angle + 0.05 * j[:, 5:6],
        scale_x * size,
        scale_y * size,
        string,
    )


class World:
    """The painter of one frame size on one device: holds the layers and the shape tables.

    `height` and `width` are pixels, multiples of 16 by the model's need, not the painter's.
    """

    def __init__(self, height: int = 128, width: int = 224, device: torch.device | str = "cpu") -> None:
        self.height, self.width, self.device = height, width, torch.device(device)
        layers = [backdrops.paint(name, height, width) for name in BACKGROUNDS]
        self.far = torch.stack([far for far, _ in layers]).to(self.device)
        self.near = torch.stack([near for _, near in layers]).to(self.device)
        self.shapes = shapes.tables(SHAPES, self.device)
        v = (torch.arange(height, device=self.device) + 0.5) / height - 0.5
        u = (torch.arange(width, device=self.device) + 0.5 - width / 2) / height
        self.v, self.u = (t.contiguous() for t in torch.meshgrid(v, u, indexing="ij"))

    def render(self, scenes: Scenes, times: Tensor) -> tuple[Tensor, Tensor]:
        """Draw N scenes at `times` `[T]` (frames since the start; any integers).

        Returns pixels `[N, 3, T, H, W]` in -1..1 and the object's mask `[N, 1, T, H, W]` in 0..1.
        """
        scenes, times = scenes.to(self.device), times.to(self.device)
        picture = self._background(scenes, times)
        placed = place(scenes, times)
        picture, mask = self._object(picture, scenes, placed)
        return picture.mul(2).sub(1).clamp(-1, 1), mask

    def _background(self, scenes: Scenes, times: Tensor) -> Tensor:
        j = scenes.jitter.to(torch.float32)
        turn = 2 * math.pi * times[None].to(torch.float32) / PERIOD
        dx = DRIFT * torch.sin(turn) + 0.02 * j[:, 6:7]
        dy = 0.3 * DRIFT * torch.sin(turn + 1.0) + 0.01 * j[:, 7:8]
        far = self._layer(self.far[scenes.background], 0.4 * dx, 0.4 * dy)[:, :3]
        near = self._layer(self.near[scenes.background], dx, dy)
        return far * (1 - near[:, 3:]) + near[:, :3]

    def _layer(self, canvas: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
        """`canvas` `[N, C, h, w]` seen with offsets `[N, T]` in frame heights: `[N, C, T, H, W]`."""
        h, w = canvas.shape[-2:]
        x = (self.u + dx[..., None, None]) * (2 * self.height / w)
        y = (self.v + dy[..., None, None]) * (2 * self.height / h)
        return _sample(canvas, x, y)

    def _object(self, picture: Tensor, scenes: Scenes, p: Placement) -> tuple[Tensor, Tensor]:
        shown = (scenes.shape != NO_OBJECT).to(torch.float32)[:, None, None, None, None]
        table = self.shapes[scenes.shape.clamp(min=0)]
        x, y = (self.u - p.x[..., None, None]), (self.v - p.y[..., None, None])
        d, shade = self._lookup(table, x, y, p).split(1, dim=1)
        # The shadow falls down and to the right, soft, and is part of the object's picture, not its mask.
        below = self._lookup(table[:, :1], x - 0.035, y - 0.05, p)
        picture = picture * (1 - 0.38 * shown * torch.sigmoid(-below / 0.018))
        clear = torch.hypot(x, y)[:, None] > 0.6 * RADIUS  # not through the hole of a ring
        line = self._string(p, x) * shown * (d > 0) * clear
        picture = torch.lerp(picture, torch.full_like(picture, 0.16), line)
        colour = PALETTE.to(self.device)[scenes.colour][:, :, None, None, None]
        picture = _compose(picture, d, shade, colour, x[:, None], y[:, None], shown, 1.0 / self.height)
        return picture, shown * _cover(d - 0.016, 1.0 / self.height)

    def _lookup(self, table: Tensor, x: Tensor, y: Tensor, p: Placement) -> Tensor:
        """Distance in frame heights (and shade) at offsets `x`, `y` `[N, T, H, W]` from the centre."""
        c, s = torch.cos(p.angle)[..., None, None], torch.sin(p.angle)[..., None, None]
        ox = (c * x + s * y) / p.scale_x[..., None, None] / shapes.EXTENT
        oy = (c * y - s * x) / p.scale_y[..., None, None] / shapes.EXTENT
        out = _sample(table, ox, oy, padding="border")
        size = torch.minimum(p.scale_x, p.scale_y)[:, None, :, None, None]
        return torch.cat([out[:, :1] * size, out[:, 1:]], dim=1)

    def _string(self, p: Placement, x: Tensor) -> Tensor:
        """Coverage `[N, 1, T, H, W]` of the pendulum's string, from its pivot to the object's centre."""
        px, py = PIVOT
        along_x, along_y = p.x - px, p.y - py
        length = torch.hypot(along_x, along_y).clamp(min=1e-3)
        ux, uy = (along_x / length)[..., None, None], (along_y / length)[..., None, None]
        across = ((self.u - px) * uy - (self.v - py) * ux).abs()
        within = (self.v < p.y[..., None, None]).to(across.dtype)
        return (_cover(across - 0.009, 1.0 / self.height) * within * p.string[..., None, None])[:, None]


def _sample(canvas: Tensor, x: Tensor, y: Tensor, padding: str = "border") -> Tensor:
    """Bilinear reads of `[N, C, h, w]` at `[N, T, H, W]` coordinates in -1..1: `[N, C, T, H, W]`."""
    n, t, h, w = x.shape
    grid = torch.stack([x, y], dim=-1).view(n, t * h, w, 2)
    out = F.grid_sample(canvas, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return out.view(n, -1, t, h, w)


def _cover(d: Tensor, pixel: float) -> Tensor:
    """Antialiased coverage of d < 0; `pixel` is a pixel's size in the units of `d`."""
    return (0.5 - d / (1.4 * pixel)).clamp(0, 1)


def _compose(
    picture: Tensor, d: Tensor, shade: Tensor, colour: Tensor, x: Tensor, y: Tensor, shown: Tensor, px: float
) -> Tensor:
    """Lay the object over the picture: white rim, dark outline, shaded body, a fixed highlight."""
    body = colour * (0.90 + 0.14 * shade) + 0.05 * shade.clamp(min=0)
    body = body * (1 - 0.18 * torch.sigmoid((d + 0.022) / 0.008))
    gloss = torch.exp(-((x + 0.055) ** 2 + (y + 0.075) ** 2) / 0.0019)
    body = torch.lerp(body, torch.ones_like(body), 0.55 * gloss)
    picture = torch.lerp(picture, torch.full_like(picture, 0.98), 0.85 * shown * _cover(d - 0.016, px))
    picture = torch.lerp(picture, torch.full_like(picture, 0.09), shown * _cover(d - 0.003, px))
    return torch.lerp(picture, body.clamp(0, 1), shown * _cover(d + 0.013, px))
