from __future__ import annotations

from pathlib import Path

import pytest

from wanrt.tiny.__main__ import ASSETS


@pytest.fixture(scope="session")
def assets() -> Path:
    return ASSETS


@pytest.fixture(scope="session")
def judge_file() -> Path:
    return Path(__file__).parent / "judge.safetensors"
