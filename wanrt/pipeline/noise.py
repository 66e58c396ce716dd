"""Noise as a function of (seed, chunk, step) alone, the same on every device, topology and run.

Generator: Philox 4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11), as NumPy's
`Philox` bit generator gives it, key = seed + 2^64 (2^32 chunk + step), counter from 0. NumPy promises a
stable stream for its bit generators, not for its distributions (NEP 19), and torch promises neither across
versions, so the normal distribution is made here: Box-Muller on the two 32-bit halves of each word, in
float64, rounded to float32 at the end. Float64's last bits may differ between math libraries; after the
rounding a value differs about once in 10^8, by one float32 ulp. The tails end at 6.66 standard deviations.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from wanrt.errors import UsageError

if TYPE_CHECKING:
    import torch

SEED_LIMIT = 2**64
COUNTER_LIMIT = 2**32


def philox_key(seed: int, chunk: int, step: int) -> int:
    """The 128-bit key of one draw: three numbers, no two triples the same key.

    Raises `UsageError` for a seed outside 0..2^64-1 or a chunk or step outside 0..2^32-1.
    """
    for name, value, limit in (
        ("seed", seed, SEED_LIMIT),
        ("chunk", chunk, COUNTER_LIMIT),
        ("step", step, COUNTER_LIMIT),
    ):
        if not 0 <= value < limit:
            raise UsageError(f"{name} {value} is outside 0..{limit - 1}; choose one inside")
    return seed | (chunk << 96) | (step << 64)


def standard_normal(key: int, count: int) -> np.ndarray:
    """`count` float32 samples of the standard normal distribution from one Philox stream."""
    words = np.random.Philox(key=key).random_raw((count + 1) // 2)
    radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32))
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    out = np.empty((len(words), 2), dtype=np.float32)
    out[:, 0] = radius * np.cos(angle)
    out[:, 1] = radius * np.sin(angle)
    return out.reshape(-1)[:count]


def noise(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of `shape`, float32, on the CPU.

    `step` 0 is the noise a chunk starts from; `step` k > 0 is the fresh noise added after the k-th
    prediction.
    """
    import torch

    return torch.from_numpy(standard_normal(philox_key(seed, chunk, step), prod(shape)).reshape(shape))
