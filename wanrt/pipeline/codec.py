"""The VAE of one stream, on one device or split over several ranks. Both look the same to stage 0.

A split VAE's ranks follow stage 0's commands, which come through the team's pipes; latents, halos and pixels go
through the VAE's process group, stage 0 being its first rank. The frame of an anchor never leaves the bands it was
decoded in: each rank keeps its own, and only the encoded latent is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from wanrt.parallel.team import Team, answering
from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.lanes import Lanes, OneLane
from wanrt.telemetry import Recorder

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from wanrt.parallel.vae_split import SplitVae

STAGE = "vae"  # of the ranks besides stage 0, which records its own part as ever


class StreamingVae(Protocol):
    """What stage 0 needs of a VAE; the Wan VAE, a band of it, and TAEHV offer it."""

    def decoder_state(self) -> Any:
        """State of one stream's decoder."""
        ...

    def decode(self, latent: torch.Tensor, state: Any) -> torch.Tensor:
        """`[B, 16, 1, h, w]` to pixels `[B, 3, 1 or 4, H, W]` in -1..1."""
        ...

    def encode_frame(self, pixels: torch.Tensor) -> torch.Tensor:
        """A lone frame `[B, 3, 1, H, W]` to `[B, 16, 1, h, w]`, fresh state."""
        ...


class Codec(Protocol):
    """One stream's VAE: latents in order, and anchors of those whose last frame was kept."""

    def decode(self, latent: torch.Tensor, index: int, *, keep: bool) -> torch.Tensor:
        """Pixels of the stream's next latent, number `index`; `keep` their last frame for `encode`."""
        ...

    def encode(self, index: int) -> torch.Tensor:
        """The anchor of a kept frame, float32 `[B, 16, 1, h, w]`; the frame is then forgotten."""
        ...


class LocalCodec:
    """A VAE in this process. `lanes`: whose memory is shared between the two lanes' calls."""

    def __init__(self, vae: StreamingVae, lanes: Lanes | None = None) -> None:
        self._vae, self._lanes = vae, lanes or OneLane()
        self._state = vae.decoder_state()
        self._kept: dict[int, torch.Tensor] = {}

    def decode(self, latent: torch.Tensor, index: int, *, keep: bool) -> torch.Tensor:
        """See `Codec.decode`."""
        pixels = self._lanes.share(self._vae.decode(latent, self._state))
        if keep:
            self._kept[index] = self._lanes.share(pixels[:, :, -1:].clone())
        return pixels

    def encode(self, index: int) -> torch.Tensor:
        """See `Codec.encode`."""
        return self._lanes.share(self._vae.encode_frame(self._kept.pop(index)).float())


@dataclass(frozen=True)
class Decode:
    """Command: take part in the decode of latent `latent`, whose values follow; `keep` your last frame of it."""

    latent: int
    keep: bool


@dataclass(frozen=True)
class Encode:
    """Command: take part in the encode of the frame kept of latent `latent`."""

    latent: int


class VaePart:
    """One rank's band of a split VAE.

    Args:
        vae: its band.
        group: of the VAE's ranks; the first one is stage 0.
        shape: of a latent, `(1, z, 1, h, w)`.
        device: of this rank.
        lanes: see `LocalCodec`.
    """

    def __init__(
        self,
        vae: SplitVae,
        group: ProcessGroup,
        shape: tuple[int, ...],
        device: torch.device,
        lanes: Lanes | None = None,
    ) -> None:
        self._vae, self._group, self._shape, self._device = vae, group, shape, device
        self._codec = LocalCodec(vae, lanes)

    def decode(self, latent: torch.Tensor | None, index: int, *, keep: bool) -> torch.Tensor | None:
        """This band's part; the first rank passes the latent, and gets the whole pixels."""
        return self._vae.collect(self._codec.decode(self._share(latent), index, keep=keep))

    def encode(self, index: int) -> torch.Tensor:
        """This band's part in an anchor, which is whole on every rank."""
        return self._codec.encode(index)

    def follow(self, command: Decode | Encode, recorder: Recorder) -> None:
        """What a rank besides stage 0 does at a command."""
        import torch

        chunk = command.latent // CHUNK_LATENTS
        name = "decode" if isinstance(command, Decode) else "encode"
        with torch.inference_mode(), recorder.span(STAGE, name, chunk, latent=command.latent):
            if isinstance(command, Decode):
                self.decode(None, command.latent, keep=command.keep)
            else:
                self.encode(command.latent)

    def close(self) -> None:
        """Takes part no more; comes before the process group is left."""
        self._vae.close()

    def _share(self, latent: torch.Tensor | None) -> torch.Tensor:
        import torch
        import torch.distributed as dist

        if latent is None:
            latent = torch.empty(self._shape, device=self._device)
        latent = latent.float().contiguous()
        dist.broadcast(latent, src=dist.get_global_rank(self._group, 0), group=self._group)
        return latent


class TeamCodec:
    """Stage 0's `Codec` on a split VAE: its own part here, the others' by command.

    Args:
        team: the rank processes.
        part: of this process.
        names: of the other ranks with a part.
    """

    def __init__(self, team: Team, part: VaePart, names: frozenset[str]) -> None:
        self._team, self._part, self._names = team, part, names

    def decode(self, latent: torch.Tensor, index: int, *, keep: bool) -> torch.Tensor:
        """See `Codec.decode`."""
        self._team.send(Decode(index, keep), self._names)
        with answering(self._team, f"VAE: latent {index} was not decoded"):
            pixels = self._part.decode(latent, index, keep=keep)
        assert pixels is not None
        return pixels

    def encode(self, index: int) -> torch.Tensor:
        """See `Codec.encode`."""
        self._team.send(Encode(index), self._names)
        with answering(self._team, f"VAE: the anchor of latent {index} was not encoded"):
            return self._part.encode(index)
