"""Contact sheets and GIFs from clips, for people to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in -1..1 to uint8 0..255, rounded."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def tile(pictures: Tensor, columns: int, gap: int = 4) -> Tensor:
    """`[N, 3, H, W]` uint8 to one picture `[3, rows, columns]` with light gaps."""
    n, c, h, w = pictures.shape
    rows = -(-n // columns)
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 245, dtype=torch.uint8)
    for i in range(n):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[:, y : y + h, x : x + w] = pictures[i]
    return sheet


def save_picture(picture: Tensor, path: Path) -> None:
    """Write `[3, H, W]` uint8; the format follows the file's name."""
    from PIL import Image

    Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(path)


def contact_sheet(clips: Tensor, frames: list[int]) -> Tensor:
    """`[N, 3, T, H, W]` in -1..1: one row per clip, one column per frame index."""
    picked = to_uint8(clips[:, :, frames]).cpu()
    return tile(picked.transpose(1, 2).flatten(0, 1), len(frames))


def save_gif(clips: Tensor, path: Path, columns: int, fps: float = 16, colours: int = 160) -> None:
    """`[N, 3, T, H, W]` in -1..1 as one looping GIF, the clips tiled `columns` wide, one palette for all."""
    from PIL import Image

    frames = [tile(to_uint8(clips[:, :, t]).cpu(), columns) for t in range(clips.shape[2])]
    images = [Image.fromarray(f.permute(1, 2, 0).contiguous().numpy()) for f in frames]
    palette = images[0].quantize(colours)
    images = [i.quantize(colours, palette=palette, dither=Image.Dither.NONE) for i in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
