"""What stage 0 and the mesh say to each other: one envelope down for each chunk, three latents up.

A prompt goes down ahead of its chunk's envelope: the mesh makes keys and values of it while the anchor is made.

Tensors of an envelope live on the sender's device and are never written again after sending. In one process
they are passed by reference; across processes the transport copies them. Shapes: B streams (1), h = H/8, w =
W/8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim bool: no NaN, no Inf. One pass: a sum over NaN or Inf is neither finite nor hidden by the rest."""
    import torch

    with torch.inference_mode():
        return torch.isfinite(tensor.float().sum())


@dataclass(frozen=True)
class Control:
    """Settings that hold from this chunk on."""

    steps: tuple[float, ...]  # timesteps as the model sees them, falling from 1000
    bias: float = 1.0  # b of the KV attention bias log(b), in (0, 1]; 1 is off
    seed: int | None = None  # of the noise; None: the one that the mesh began with


@dataclass(frozen=True)
class ChunkRequest:
    """Down: everything the mesh needs to start chunk number `chunk`."""

    chunk: int
    anchor: torch.Tensor | None = (
        None  # [B, 16, 1, h, w] float32, normalised latents; None when the plan has no anchor
    )
    control: Control | None = None  # None when nothing changed; never None for chunk 0


@dataclass(frozen=True)
class ChunkResult:
    """Up: a finished chunk."""

    chunk: int
    latents: torch.Tensor  # [B, 16, 3, h, w] float32, normalised latents
    finite: (
        torch.Tensor
    )  # 0-dim bool on the latents' device: no NaN, no Inf. Read it when reading cannot stall.


class MeshHandle(Protocol):
    """Stage 0's end of the line to a mesh, wherever it runs: this process, or ranks of a process group.

    Call order: `submit(0)`, `receive() -> 0`, `submit(1)`, `receive() -> 1`, ...; at most one chunk under
    way. `set_text` comes before the `submit` of the first chunk of a prompt, and before that of chunk 0.
    """

    @property
    def launches_here(self) -> bool:
        """Whether `submit` queues passes on a device of this process, and may wait until it has room for them."""
        ...

    def set_text(self, chunk: int, embedding: torch.Tensor) -> None:
        """The prompt `[B, L, text_dim]` from `chunk` on, the next to be submitted.

        Raises `RunError` when the mesh is gone, or a chunk under way.
        """
        ...

    def submit(self, request: ChunkRequest) -> None:
        """Hands a request over; returns before the chunk is made. Raises `RunError` when the mesh is gone."""
        ...

    def receive(self) -> ChunkResult:
        """Waits for the result of the request under way. Raises `RunError` with the rank that failed."""
        ...

    def check(self) -> None:
        """Raises `RunError` when the mesh is gone. Never waits."""
        ...

    def close(self) -> None:
        """Ends the mesh; safe to call twice."""
        ...
