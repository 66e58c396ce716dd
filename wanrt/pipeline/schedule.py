"""The noise schedule of Wan2.1's flow matching, and the few-step sampler's rule on top of it.

    sigma(s) = shift s / (1 + (shift - 1) s),  s = 1, 0.999, ..., 0.001;  timestep t = 1000 sigma
    x_t = (1 - sigma) x0 + sigma noise;  the model predicts v = noise - x0, hence x0 = x_t - sigma v

Source of table and lookup: guandeh17/Self-Forcing utils/scheduler.py (`FlowMatchScheduler` with sigma_min =
0, extra_one_step, 1000 steps) and utils/wan_wrapper.py (`_convert_flow_pred_to_x0`) at 33593df;
krea-ai/realtime-video has the same at acf4b7b. There a timestep finds its sigma as the *nearest table entry*:
937 has sigma 0.93697, not 0.937, and 0 has sigma 0.00498, not 0. Models were distilled with that rule, so it
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from wanrt.errors import UsageError

if TYPE_CHECKING:
    import torch

TRAIN_STEPS = 1000


def shifted(s: float, shift: float) -> float:
    """Sigma of the unshifted fraction `s` in 0..1; both ends are fixed points."""
    return shift * s / (1.0 + (shift - 1.0) * s)


def sigma_table(shift: float) -> tuple[float, ...]:
    """The 1000 sigmas, falling from 1 to the last one above 0."""
    return tuple(shifted(1.0 - i / TRAIN_STEPS, shift) for i in range(TRAIN_STEPS))


def nearest_sigma(timestep: float, shift: float) -> float:
    """Sigma of the table entry whose timestep lies nearest to `timestep` (0..1000)."""
    sigmas = sigma_table(shift)
    return min(sigmas, key=lambda sigma: abs(TRAIN_STEPS * sigma - timestep))


def warp(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Nominal steps (1000 s) as timesteps of the shifted schedule: 1000, 750, 500, 250 -> 1000, 937.5, 833.3,
    625.
    """
    return tuple(TRAIN_STEPS * shifted(step / TRAIN_STEPS, shift) for step in steps)


@dataclass(frozen=True)
class Schedule:
    """The denoising steps of one chunk: timesteps (0..1000, falling) and their sigmas, both already looked
    up.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, timesteps: Sequence[float], shift: float) -> Schedule:
        """Looks up the sigmas of warped `timesteps`. Raises `UsageError` unless they fall within 1000..0."""
        steps = tuple(float(t) for t in timesteps)
        if not steps or steps[0] > TRAIN_STEPS or steps[-1] < 0 or any(a <= b for a, b in pairwise(steps)):
            raise UsageError(
                f"steps {list(steps)}: expected falling timesteps within 1000..0, e.g. 1000, 937.5, 625"
            )
        if shift <= 0:
            raise UsageError(f"shift {shift}: expected a number above 0, e.g. 5")
        return cls(steps, tuple(nearest_sigma(t, shift) for t in steps))

    def __len__(self) -> int:
        return len(self.timesteps)


def predict_x0(noisy: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """The clean latents a velocity points to: x0 = x_t - sigma v, in `noisy`'s dtype (float32 in the
    pipeline).
    """
    return noisy - sigma * velocity.to(noisy.dtype)


def renoise(clean: torch.Tensor, fresh: torch.Tensor, sigma: float) -> torch.Tensor:
    """Clean latents noised again to level `sigma`: (1 - sigma) x0 + sigma noise."""
    return (1.0 - sigma) * clean + sigma * fresh
