"""Which way a VAE's picture is cut into bands: the way in which the widest band's convolutions cost less. No torch.

wanrt's convolution for Hopper computes whole tiles, and a band has a tile more than it needs where its size is just
above a multiple. At 576x320 two bands of rows (20 of 40 latent lines) fill their tiles but for the smallest size;
two bands of columns (36 of 72, and a halo column) compute 320 columns for 288 at full size and 160 for 144 before.
Border lines are longer that way (576 pixels for 320), some 40 us a decode between two H100s, an order less.
The rule holds on every device: elsewhere the bands' shape matters less.
"""

from __future__ import annotations

from enum import StrEnum

from wanrt.errors import UsageError

TILE_HEIGHT, TILE_WIDTH = 8, 32  # pixels of the large tile of `wanrt_kernels.conv_window`
# Size of a map, of a latent's one: share of a decode's multiplications in its 3x3x3 convolutions (dim_mult 1, 2, 4, 4).
ARITHMETIC = {1: 0.04, 2: 0.18, 4: 0.39, 8: 0.39}


class Axis(StrEnum):
    """What the bands are stacked along."""

    ROWS = "rows"
    COLUMNS = "columns"


def axis_of(height: int, width: int, parts: int) -> Axis:
    """What to cut a latent of `height` x `width` along into `parts`; of two that cost the same, with shorter borders.

    Raises `UsageError` for more parts than lines on the longer side.
    """
    sides = {Axis.ROWS: height, Axis.COLUMNS: width}
    if parts > (lines := max(height, width)):
        raise UsageError(
            f"vae={parts} > {lines}, the longer side of a latent of {width}x{height}; nearest valid: vae={lines}"
        )
    possible = [axis for axis, lines in sides.items() if lines >= parts]
    return min(possible, key=lambda axis: (band_cost(axis, height, width, parts), -sides[axis]))


def band_cost(axis: Axis, height: int, width: int, parts: int) -> float:
    """Pixels in tiles of the widest of `parts` bands, of the picture's own: 1 / `parts` if nothing were wasted.

    Mean over the sizes of a decode by `ARITHMETIC`. Halo columns are computed, of halo rows nothing is.
    """
    sides = min(parts - 1, 2)
    cost = 0.0
    for scale, share in ARITHMETIC.items():
        rows, columns = height * scale, width * scale
        if axis is Axis.ROWS:
            own = -(-height // parts) * scale, columns
        else:
            own = rows, -(-width // parts) * scale + sides
        cost += share * _tiled(*own) / (rows * columns)
    return cost


def _tiled(height: int, width: int) -> int:
    return -(-height // TILE_HEIGHT) * TILE_HEIGHT * (-(-width // TILE_WIDTH) * TILE_WIDTH)
