"""Which way a VAE's picture is cut, and what the widest band's tiles cost."""

from __future__ import annotations

from itertools import pairwise

import pytest

from wanrt.errors import UsageError
from wanrt.models.vae import VaeConfig
from wanrt.parallel.vae_axis import ARITHMETIC, TILE_HEIGHT, TILE_WIDTH, Axis, axis_of, band_cost
from wanrt_kernels import conv_window


def test_tiles_are_the_kernels():
    assert TILE_HEIGHT == conv_window.TILE_HEIGHT
    assert max(pixels for pixels, _ in conv_window.TILES) == TILE_HEIGHT * TILE_WIDTH


def test_shares_are_a_decodes():
    """Channels in times channels out of the decoder's 3x3x3 convolutions, times pixels and frames."""
    config = VaeConfig()
    mult = config.dim_mult[::-1]
    operations, frames, scale = {}, 1, 1
    for level, (before, now) in enumerate(pairwise((mult[0], *mult))):
        # an upsampling gives half of its channels
        first = before if level == 0 else before / 2
        count = first * now + (2 * config.num_res_blocks + 1) * now * now
        middle = 4 * now * now if level == 0 else 0
        operations[scale] = (count + middle) * frames * scale**2
        if level < len(config.temporal_downsample):
            frames *= 2 if config.temporal_downsample[::-1][level] else 1
            scale *= 2
    shares = {size: count / sum(operations.values()) for size, count in operations.items()}
    assert sum(ARITHMETIC.values()) == pytest.approx(1)
    assert shares == pytest.approx(ARITHMETIC, abs=0.005)


def test_two_bands_of_rows_fill_their_tiles():
    """576x320: 20 latent rows are 160, 80 and 40 rows without a rest; 36 latent columns and a halo column are not."""
    rows, columns = (band_cost(axis, 40, 72, 2) for axis in Axis)
    assert rows == pytest.approx(0.04 * 24 * 96 / 2880 + 0.18 * 40 * 160 / 11520 + 0.78 / 2)
    assert columns == pytest.approx(0.04 * 64 / 72 + 0.18 * 96 / 144 + 0.39 * 160 / 288 + 0.39 * 320 / 576)
    assert axis_of(40, 72, 2) is Axis.ROWS


@pytest.mark.parametrize(("height", "width"), [(40, 72), (60, 104), (104, 60), (90, 160)])
@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_the_cheaper_way_is_taken(height, width, parts):
    chosen = axis_of(height, width, parts)
    costs = {axis: band_cost(axis, height, width, parts) for axis in Axis}
    assert costs[chosen] == min(costs.values())
    assert costs[chosen] >= 1 / parts


def test_a_side_with_too_few_lines_is_not_cut():
    assert axis_of(3, 7, 4) is Axis.COLUMNS
    assert axis_of(7, 3, 4) is Axis.ROWS
    with pytest.raises(UsageError, match="nearest valid: vae=7"):
        axis_of(7, 3, 8)
