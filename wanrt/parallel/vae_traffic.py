"""What a VAE split into bands exchanges, in bytes and messages, from its sizes alone. No torch.

Mirrors the plan of `wanrt.parallel.vae_split` line by line; a test counts the bytes of real ranks against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from wanrt.parallel.vae_axis import Axis, axis_of

LATENT_CHANNELS = 16
PIXEL_CHANNELS = 3
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class VaeSizes:
    """The numbers of a Wan VAE, as in `wanrt.models.vae.VaeConfig`, and a latent's height and width."""

    base_dim: int
    height: int
    width: int
    num_res_blocks: int = 2
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    def cut(self, parts: int) -> tuple[int, int]:
        """(latent lines that `parts` bands are made of, values of one channel of one latent border line)."""
        rows = axis_of(self.height, self.width, parts) is Axis.ROWS
        return (self.height, self.width) if rows else (self.width, self.height)

    @property
    def deepest(self) -> int:
        """Channels at latent size, which the attention gathers."""
        return self.base_dim * self.dim_mult[-1]


@dataclass(frozen=True)
class Exchange:
    """What the busiest rank sends for one call: bytes, and how many messages wait for one another."""

    bytes: int
    messages: int


def decode_exchange(vae: VaeSizes, parts: int, element: int) -> Exchange:
    """One steady latent, decoded by `parts` ranks; `element`: bytes of an activation."""
    return _exchange(vae, parts, element, list(_decoder_lines(vae)), vae.deepest)


def encode_exchange(vae: VaeSizes, parts: int, element: int) -> Exchange:
    """One lone frame; its latent is gathered too."""
    return _exchange(vae, parts, element, list(_encoder_lines(vae)), vae.deepest + LATENT_CHANNELS, gathers=2)


def _exchange(
    vae: VaeSizes, parts: int, element: int, lines: list[int], gathered: int, gathers: int = 1
) -> Exchange:
    if parts == 1:
        return Exchange(0, 0)
    sides = 2 if parts > 2 else 1
    across, line = vae.cut(parts)
    values = sides * sum(lines) + (parts - 1) * -(-across // parts) * gathered
    return Exchange(values * line * element, len(lines) + gathers)


def _decoder_lines(vae: VaeSizes) -> Iterator[int]:
    """Channels x frames x size of every line that a band sends to one neighbour, of a latent border line's one."""
    widths = [vae.base_dim * m for m in (vae.dim_mult[-1], *vae.dim_mult[::-1])]
    yield LATENT_CHANNELS
    yield from [widths[0]] * 5  # conv1, and four convolutions in the middle
    frames, size = 1, 1
    for level, (_, width) in enumerate(pairwise(widths)):
        yield from [width * frames * size] * (2 * (vae.num_res_blocks + 1))
        if level < len(vae.temporal_downsample):
            frames *= 2 if vae.temporal_downsample[::-1][level] else 1
            size *= 2


def _encoder_lines(vae: VaeSizes) -> Iterator[int]:
    widths = [vae.base_dim * m for m in (1, *vae.dim_mult)]
    size = 2 ** len(vae.temporal_downsample)
    yield PIXEL_CHANNELS * size
    yield widths[0] * size
    for level, (_, width) in enumerate(pairwise(widths)):
        yield from [width * size] * (2 * vae.num_res_blocks)
        if level < len(vae.temporal_downsample):
            size //= 2
            yield width * size
    yield from [widths[-1]] * 4
