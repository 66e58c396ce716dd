"""What torchrun, or whatever else started a rank, says of this process. No torch.

Variables as PyTorch documents them for `torchrun` (pytorch/pytorch torch/distributed/run.py, "Environment
Variables"): RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wanrt.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together. Rank 0 is on the node `master`."""

    rank: int
    world: int
    local_rank: int
    master: str
    port: int

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> Launch | None:
        """The launch that the environment tells of; None where RANK or WORLD_SIZE is not set, or a container that
        knows nothing of torchrun says WORLD_SIZE=1.

        Raises `UsageError` when the others are missing, or are no numbers.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        if environment["WORLD_SIZE"] == "1" and "TORCHELASTIC_RUN_ID" not in environment:
            return None
        missing = [name for name in VARIABLES if name not in environment]
        if missing:
            raise UsageError(
                f"RANK and WORLD_SIZE are set without {', '.join(missing)}; start wanrt with torchrun, or unset them"
            )
        rank, world, local, port = (
            _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        if rank >= world:
            raise UsageError(f"RANK={rank}: expected below WORLD_SIZE={world}")
        return cls(rank, world, local, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r}: expected a number, as torchrun sets it")
    return int(text)


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one of its launch that talks to the user: rank 0, or one on its own."""
    return environment.get("RANK", "0") == "0" or "WORLD_SIZE" not in environment
