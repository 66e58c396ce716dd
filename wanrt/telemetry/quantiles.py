"""Quantiles of an endless series in bounded memory."""

from __future__ import annotations

import random
from collections.abc import Sequence


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile (0..1) with linear interpolation between closest ranks, as `numpy.quantile` does by
    default.

    Raises `ValueError` for an empty series.
    """
    if not values:
        raise ValueError("quantile of an empty series")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Reservoir:
    """A uniform sample of a series (Vitter 1985, algorithm R): exact up to `capacity` values, then a fair
    sample.

    Count, sum and maximum stay exact for ever. The replacement draws are seeded, so equal series give equal
    samples.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._random = random.Random(0)
        self._sample: list[float] = []
        self.count = 0
        self.sum = 0.0
        self.max = 0.0

    def add(self, value: float) -> None:
        """Take one more value of the series."""
        self.count += 1
        self.sum += value
        self.max = max(self.max, value)
        if len(self._sample) < self._capacity:
            self._sample.append(value)
            return
        slot = self._random.randrange(self.count)
        if slot < self._capacity:
            self._sample[slot] = value

    @property
    def sample(self) -> tuple[float, ...]:
        """The values kept, in no order that means anything once `count` exceeds the capacity."""
        return tuple(self._sample)
