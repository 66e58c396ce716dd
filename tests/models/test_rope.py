"""Rotary tables against complex fp64 numbers."""

import pytest
import torch

from wanrt.models.rope import RopeTable, axis_pairs
from wanrt_kernels.rope_norm import rope_norm_ref


def rotate(x, table):
    return rope_norm_ref(x.flatten(2), None, table.cos, table.sin, head_dim=x.shape[-1], eps=0.0)


def complex_rope(x, frames, grid):
    """Every pair as a complex number, every token's angle written out."""
    pairs = x.shape[-1] // 2
    third = pairs // 3
    split = (pairs - 2 * third, third, third)
    out = torch.view_as_complex(x.double().unflatten(-1, (pairs, 2)))
    places = [(f, r, c) for f in range(frames) for r in range(grid[0]) for c in range(grid[1])]
    for token, place in enumerate(places):
        angle = [p * 10000.0 ** (-i / n) for p, n in zip(place, split, strict=True) for i in range(n)]
        turn = torch.polar(torch.ones(pairs).double(), torch.tensor(angle, dtype=torch.float64))
        out[:, token] *= turn
    return torch.view_as_real(out).flatten(-2)


def test_wan_heads_split_22_21_21():
    assert axis_pairs(128) == (22, 21, 21)


@pytest.mark.parametrize("head_dim", [12, 16, 20, 128])
@pytest.mark.parametrize(("frames", "grid"), [(1, (1, 1)), (4, (3, 5)), (2, (1, 7))])
def test_rotate_equals_complex(head_dim, frames, grid):
    x = torch.randn(2, frames * grid[0] * grid[1], 3, head_dim)
    got = rotate(x, RopeTable.build(head_dim, frames, grid))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), complex_rope(x, frames, grid), rtol=0, atol=2e-6)


def test_tables_are_exact_to_fp32_far_out():
    """15 latent frames of 60 x 104 tokens: fp32 rounding of exact angles, not fp32 angles."""
    table = RopeTable.build(128, 15, (60, 104))
    last = 14.0 * 10000.0 ** (-torch.arange(22).double() / 22)
    torch.testing.assert_close(table.cos[-1, :22].double(), last.cos(), rtol=0, atol=6e-8)
    torch.testing.assert_close(table.sin[-1, :22].double(), last.sin(), rtol=0, atol=6e-8)


def test_slices_are_views_of_whole_frames():
    table = RopeTable.build(16, 5, (2, 3))
    part = table.slice_frames(2, 2)
    assert part.cos.shape == (12, 8)
    assert part.cos.data_ptr() == table.cos[12].data_ptr()
    x = torch.randn(1, 30, 1, 16)
    torch.testing.assert_close(rotate(x[:, 12:24], part), rotate(x, table)[:, 12:24])


def test_scores_depend_on_distance_only():
    """What bounded positions rest on: shifting all frames by the same number changes no score."""
    table = RopeTable.build(24, 9, (1, 1))
    q, k = torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 24)

    def score(i, j):
        return (rotate(q, table.slice_frames(i, 1)) * rotate(k, table.slice_frames(j, 1))).sum()

    torch.testing.assert_close(score(3, 1), score(8, 6), rtol=0, atol=1e-5)
