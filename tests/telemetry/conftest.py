from __future__ import annotations

import pytest


class FakeClock:
    """Nanoseconds that only move when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, ms: float) -> None:
        self.now += round(ms * 1e6)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
