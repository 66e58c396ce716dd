"""Rotary positions of video tokens: fp32 tables of cosines and sines over three axes.

A head of `head_dim` numbers is `head_dim/2` consecutive pairs. The pairs are dealt to (frame, row,
column); pair i of an axis with n pairs turns by `position * theta**(-i/n)`. Source: Wan-Video/Wan2.1
`wan/modules/model.py` (`rope_params`, `rope_apply`) at 9737cba, which does the same with complex fp64
numbers; Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0  # Wan2.1 wan/modules/model.py `rope_params` at 9737cba


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of a head that carry (frame, row, column); (22, 21, 21) for `head_dim` 128."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of every token of `frames` latent frames, frame-major, then row, then column.

    Attributes:
        cos, sin: `[frames * tokens_per_frame, head_dim / 2]`, fp32.
        tokens_per_frame: tokens of one latent frame.
    """

    cos: Tensor
    sin: Tensor
    tokens_per_frame: int

    @classmethod
    def build(
        cls, head_dim: int, frames: int, grid: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> RopeTable:
        """Table for latent frames 0..frames-1 of `grid` = (rows, columns) tokens; computed in fp64 on the
        CPU.
        """
        rows, columns = grid
        angles = torch.cat(
            [
                _angles(size, pairs).reshape(*shape, pairs).expand(frames, rows, columns, pairs)
                for size, pairs, shape in zip(
                    (frames, rows, columns),
                    axis_pairs(head_dim),
                    ((-1, 1, 1), (1, -1, 1), (1, 1, -1)),
                    strict=True,
                )
            ],
            dim=-1,
        ).flatten(0, 2)
        return cls(angles.cos().float().to(device), angles.sin().float().to(device), rows * columns)

    def slice_frames(self, first: int, count: int) -> RopeTable:
        """Views of the rows of latent frames `first .. first+count-1`."""
        lo, hi = first * self.tokens_per_frame, (first + count) * self.tokens_per_frame
        return RopeTable(self.cos[lo:hi], self.sin[lo:hi], self.tokens_per_frame)


def _angles(size: int, pairs: int) -> Tensor:
    """`[size, pairs]` fp64: position times frequency."""
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
