"""What the environment says of a launch."""

import pytest

from wanrt.errors import UsageError
from wanrt.parallel.launch import Launch, speaks

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip


def test_a_launch():
    assert Launch.find(TORCHRUN) == Launch(3, 4, 1, "node-a", 29500)
    assert not speaks(TORCHRUN)
    assert speaks({**TORCHRUN, "RANK": "0"})


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_no_launch(environment):
    assert Launch.find(environment) is None
    assert speaks(environment)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "4"}, "RANK=4: expected below WORLD_SIZE=4"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x': expected a number"),
        (
            {"LOCAL_RANK": None, "MASTER_ADDR": None},
            "without LOCAL_RANK, MASTER_ADDR; start wanrt with torchrun",
        ),
    ],
)
def test_a_launch_that_is_none(change, words):
    environment = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(UsageError, match=words):
        Launch.find(environment)
