"""Contact sheets and GIFs from clips, for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


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


def _image(picture: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def _limited(image: Image.Image, palette: Image.Image | None = None) -> Image.Image:
    """`image` in 256 colours. Maximum coverage keeps small bright objects that a median cut drops."""
    from PIL import Image

    none = Image.Dither.NONE
    if palette is not None:
        return image.quantize(palette=palette, dither=none)
    return image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=4, dither=none)


def save_picture(picture: Tensor, path: Path, *, limited: bool = False) -> None:
    """Write `[3, H, W]` uint8; the format follows the file's name; `limited` to 256 colours."""
    image = _image(picture)
    (_limited(image) if limited else image).save(path, optimize=True)


def contact_sheet(clips: Tensor, frames: list[int]) -> Tensor:
    """`[N, 3, T, H, W]` in -1..1: one row per clip, one column per frame index."""
    picked = to_uint8(clips[:, :, frames]).cpu()
    return tile(picked.transpose(1, 2).flatten(0, 1), len(frames))


def save_gif(clips: Tensor, path: Path, columns: int, fps: float = 16) -> None:
    """`[N, 3, T, H, W]` in -1..1 as one looping GIF, the clips tiled `columns` wide, one palette for all."""
    images = [_image(tile(to_uint8(clips[:, :, t]).cpu(), columns)) for t in range(clips.shape[2])]
    palette = _limited(images[0])
    images = [_limited(image, palette) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
