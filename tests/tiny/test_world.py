from __future__ import annotations

import pytest
import torch

from wanrt.tiny import shapes
from wanrt.tiny.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    HELD_OUT_MODULUS,
    MOTIONS,
    SHAPES,
    cat,
    held_out,
    sample_scenes,
    scene,
)
from wanrt.tiny.world import PALETTE, PERIOD, World, place


@pytest.fixture(scope="module")
def world():
    return World(64, 112)


def test_a_clip_is_a_function_of_its_seed(world):
    times = torch.arange(0, 9, 4)
    first, mask = world.render(sample_scenes(5, 3), times)
    again, mask_again = World(64, 112).render(sample_scenes(5, 3), times)
    assert torch.equal(first, again)
    assert torch.equal(mask, mask_again)
    other, _ = world.render(sample_scenes(6, 3), times)
    assert not torch.equal(first, other)


def test_a_clip_does_not_depend_on_its_batch(world):
    scenes, times = sample_scenes(7, 4), torch.tensor([3])
    together, _ = world.render(scenes, times)
    alone, _ = world.render(scenes[slice(2, 3)], times)
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-5)


def test_pixels_and_mask_have_their_ranges(world):
    pixels, mask = world.render(sample_scenes(1, 6), torch.tensor([0, 20]))
    assert pixels.shape == (6, 3, 2, 64, 112)
    assert mask.shape == (6, 1, 2, 64, 112)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert mask.min() >= 0
    assert mask.max() <= 1


def test_the_world_repeats_after_its_period(world):
    scenes = cat([scene(shape="star", motion=m, background="city") for m in MOTIONS])
    first, _ = world.render(scenes, torch.tensor([5]))
    later, _ = world.render(scenes, torch.tensor([5 + PERIOD]))
    torch.testing.assert_close(first, later, rtol=0, atol=1e-3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_moves_and_stays_in_the_frame(world, motion):
    scenes = scene(shape="square", motion=motion, background="plain")
    _, mask = world.render(scenes, torch.arange(0, PERIOD, 4))
    assert mask[:, :, :, [0, -1]].max() < 0.5
    assert mask[..., [0, -1]].max() < 0.5
    assert (mask[:, :, 1:] - mask[:, :, :1]).abs().amax() > 0.5


def test_a_scene_without_object_shows_the_background_alone(world):
    bare = scene(shape=None, background="night")
    pixels, mask = world.render(bare, torch.tensor([0, 12]))
    assert mask.max() == 0
    full, full_mask = world.render(scene(shape="ball", background="night"), torch.tensor([0, 12]))
    far = full_mask.amax(2, keepdim=True).expand_as(full) == 0
    assert (pixels - full).abs()[far].median() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_the_object_has_its_colour(world, shape):
    for i, colour in enumerate(ATTRIBUTES["colour"]):
        pixels, mask = world.render(
            scene(shape=shape, colour=colour, background="forest", motion="sliding"), torch.tensor([0])
        )
        inside = pixels.add(1).div(2)[0, :, 0][:, mask[0, 0, 0] > 0.99]
        distances = (PALETTE[:, :, None] - inside[None]).norm(dim=1).median(dim=1).values
        assert int(distances.argmin()) == i


def test_backgrounds_differ(world):
    scenes = cat([scene(shape=None, background=b) for b in BACKGROUNDS])
    pixels, _ = world.render(scenes, torch.tensor([0]))
    distance = torch.cdist(pixels.flatten(1), pixels.flatten(1)) / pixels[0].numel() ** 0.5
    assert distance.add(torch.eye(len(BACKGROUNDS))).min() > 0.2


def test_the_split_never_leaks():
    train = sample_scenes(11, 4000)
    assert not held_out(train.shape, train.colour, train.motion, train.background).any()
    test = sample_scenes(12, 500, split="held-out")
    assert held_out(test.shape, test.colour, test.motion, test.background).all()


def test_held_out_combinations_leave_every_pair_in_training():
    grid = torch.cartesian_prod(*(torch.arange(len(v)) for v in ATTRIBUTES.values()))
    test = held_out(*grid.unbind(1))
    assert abs(float(test.float().mean()) - 1 / HELD_OUT_MODULUS) < 0.01
    for a in range(4):
        for b in range(a):
            pairs = grid[~test][:, [a, b]].unique(dim=0)
            assert len(pairs) == grid[:, [a, b]].unique(dim=0).shape[0]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held-out"):
        sample_scenes(1, 1, split="test")


def test_placement_jitter_is_small():
    scenes = sample_scenes(3, 64)
    calm = sample_scenes(3, 64, jitter=0.0)
    times = torch.tensor([0])
    a, b = place(scenes, times), place(calm, times)
    assert (a.x - b.x).abs().max() < 0.15


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_signed_distances(name):
    axis = torch.linspace(-1.8, 1.8, 181, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    d = shapes.distance(name, x, y)
    assert d.min() < -0.1
    assert d.max() > 0.5
    # A distance has slope at most 1 (the union of boxes and the sampled heart are bounds, not exact).
    slope = torch.hypot(*(g[1:-1, 1:-1] for g in torch.gradient(d, spacing=(axis, axis))))
    assert slope.max() < 1.05


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="spoon"):
        shapes.distance("spoon", torch.zeros(1), torch.zeros(1))
