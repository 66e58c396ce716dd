"""What every test needs before anything is imported."""

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Time on a shared machine says nothing about a test; CI judges a change by the same inputs every time.
settings.register_profile("wanrt", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("wanrt")

if not torch.cuda.is_available():
    # read when triton is first imported: kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Rank processes import the test functions that they run by name; last, so that the installed package is tested.
sys.path.append(str(Path(__file__).parents[1]))

pytest_plugins = ("tests.browser", "tests.servers")

# Where tests run under nohup, the programs they start would rightly ignore SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def log_level():
    """What a test that runs the whole command in this process sets must not silence what the next one listens to."""
    logger = logging.getLogger("wanrt")
    before = logger.level
    yield
    logger.setLevel(before)


def pytest_collection_modifyitems(items):
    """Skip what needs devices that are not there."""
    for marker, devices in (("gpu", 1), ("multigpu", 2)):
        missing = pytest.mark.skip(
            reason=f"needs {devices} CUDA device(s), found {torch.cuda.device_count()}"
        )
        for item in items:
            if item.get_closest_marker(marker) and torch.cuda.device_count() < devices:
                item.add_marker(missing)
