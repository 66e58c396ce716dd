import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from wanrt.errors import UsageError
from wanrt.pipeline.schedule import Schedule, nearest_sigma, predict_x0, renoise, sigma_table, warp


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_table_against_diffusers(shift):
    """diffusers builds the same table its own way: sigmas 1..1/1000, shifted (use_dynamic_shifting off)."""
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    np.testing.assert_allclose(sigma_table(shift), theirs.sigmas[:1000].numpy(), rtol=0, atol=1e-6)


def test_nearest_against_float32_argmin():
    """The lookup as the public code does it: float32 linspace, argmin of the distance."""
    s = torch.linspace(1.0, 0.0, 1001)[:-1]
    sigmas = 5.0 * s / (1 + 4.0 * s)
    for t in [1000, 937, 833, 625, 0, 937.5, 833.3333, 12.3, 500]:
        index = torch.argmin((sigmas * 1000 - t).abs())
        assert nearest_sigma(t, 5.0) == pytest.approx(sigmas[index].item(), abs=1e-6)


def test_warp_is_the_table_at_the_nominal_step():
    table = sigma_table(5.0)
    steps = (1000, 750, 500, 250)
    assert warp(steps, 5.0) == pytest.approx([1000 * table[1000 - s] for s in steps], abs=1e-9)
    assert warp(steps, 5.0) == pytest.approx((1000, 937.5, 833.3333333, 625))


def test_warped_steps_find_their_own_sigma():
    timesteps = warp((1000, 750, 500, 250), 5.0)
    schedule = Schedule.of(timesteps, 5.0)
    assert schedule.sigmas == pytest.approx([t / 1000 for t in timesteps], abs=1e-12)


def test_unwarped_steps_take_the_nearest_entry():
    schedule = Schedule.of((1000, 937, 833, 625, 0), 5.0)
    assert schedule.sigmas[1] != 0.937
    assert schedule.sigmas[1] == pytest.approx(0.937, abs=3e-4)
    assert schedule.sigmas[-1] == pytest.approx(5 * 0.001 / (1 + 4 * 0.001))


@pytest.mark.parametrize("steps", [(), (1001,), (500, 500), (250, 500), (100, -1)])
def test_bad_steps_are_refused(steps):
    with pytest.raises(UsageError, match="falling timesteps"):
        Schedule.of(steps, 5.0)


def test_a_perfect_velocity_recovers_the_clean_latents():
    clean, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    for sigma in Schedule.of((1000, 625, 0), 5.0).sigmas:
        noisy = renoise(clean, noise, sigma)
        torch.testing.assert_close(predict_x0(noisy, noise - clean, sigma), clean, rtol=0, atol=2e-6)
