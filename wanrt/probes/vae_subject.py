"""What a VAE probe looks at: one VAE behind a few callables, whatever its make.

A subject decodes and encodes whole clips without any carried state, and, where its interface allows it, opens
streams that carry state from call to call. The probe only ever compares these with each other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from wanrt.models.vae_stream import StreamingVae

Step = Callable[[Tensor], Tensor]

log = logging.getLogger("wanrt.probes")


@dataclass(frozen=True)
class Subject:
    """One VAE under examination. Pixels [B, 3, T, H, W] in [-1, 1], latents [B, C, n, h, w].

    `decode_whole` and `encode_whole` take a whole clip in one go and keep nothing; `decode_call` is the decode
    that its users call with all latents (often the same function). `open_decoder` and `open_encoder` start a
    stream and return its step, or are None when the interface forgets its state at every call.
    """

    name: str
    weights: str
    module: nn.Module
    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    decode_whole: Step
    decode_call: Step
    encode_whole: Step | None = None  # None: only the decoder is examined
    open_decoder: Callable[[], Step] | None = None
    open_encoder: Callable[[], Step] | None = None
    encode_frame: Step | None = None
    state_bytes: Callable[[Tensor], int] | None = (
        None  # a first latent -> bytes its stream's state then holds
    )
    size: tuple[int, int] = (224, 128)  # width x height for the questions about time
    short_clip: int = 5  # latents that surely decode in one call
    grid: tuple[int, int] = (8, 6)  # latent positions, width x height, for the questions about values
    small_grid: tuple[int, int] = (2, 2)  # the same for long clips
    paint: Callable[[int, int, int], Tensor] | None = (
        None  # frames, height, width -> a clip as it was trained on
    )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.module.parameters()).dtype

    def picture(self, latents: int, grid: tuple[int, int], *, familiar: bool = False) -> Tensor:
        """A moving picture that encodes to so many latents of `grid` (width, height) positions.

        `familiar`: of the kind that the VAE was trained on, where that is known.
        """
        frames = 1 + (latents - 1) * self.temporal_factor
        width, height = (side * self.spatial_factor for side in grid)
        paint = self.paint if familiar and self.paint is not None else moving_picture
        return paint(frames, height, width).to(self.device, self.dtype)

    def clip(self, latents: int, grid: tuple[int, int]) -> Tensor:
        """Latents in which neighbours in time are alike, as in a video, [1, C, latents, h, w].

        The encoding of `picture`; for a lone decoder, noise that changes slowly.
        """
        if self.encode_whole is not None:
            with torch.no_grad():
                return self.encode_whole(self.picture(latents, grid))
        shape = (1, self.latent_channels, 2, grid[1], grid[0])
        a, b = torch.randn(shape, generator=torch.Generator().manual_seed(7)).split(1, dim=2)
        turn = (0.3 * torch.arange(latents)).view(1, 1, -1, 1, 1)
        return (a * turn.cos() + b * turn.sin()).to(self.device, self.dtype)


def moving_picture(frames: int, height: int, width: int) -> Tensor:
    """A disc that circles over a drifting gradient, [1, 3, frames, height, width] in [-1, 1]."""
    t = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1)
    y = torch.linspace(-1, 1, height).view(1, -1, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, -1)
    wave = torch.sin(3 * x + 2 * y + 0.2 * t)
    away = (x - 0.6 * torch.cos(0.15 * t)).square() + (y - 0.6 * torch.sin(0.15 * t)).square()
    disc = torch.sigmoid((0.08 - away) * 60)
    sky = torch.stack([0.3 * wave, 0.5 * y.expand_as(wave), 0.4 - 0.4 * wave])
    ball = torch.tensor([0.9, -0.5, -0.6]).view(3, 1, 1, 1)
    return (sky * (1 - disc) + ball * disc).unsqueeze(0)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Seeded weights that keep activations near unit scale, so that no layer hides what lies before it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and parameter[0].numel() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


def streaming_subject(
    vae: StreamingVae, name: str, weights: str, size: tuple[int, int] = (224, 128)
) -> Subject:
    """A subject from one of wanrt's own VAEs."""

    def opener(run: Callable[..., Tensor], make_state: Callable[[], Any]) -> Callable[[], Step]:
        def start() -> Step:
            state = make_state()
            return lambda piece: run(piece, state)

        return start

    return Subject(
        name=name,
        weights=weights,
        module=vae,
        latent_channels=vae.latent_channels,
        spatial_factor=vae.spatial_factor,
        temporal_factor=vae.temporal_factor,
        decode_whole=vae.decode_train,  # type: ignore[arg-type]
        encode_whole=lambda pixels: vae.encode_train(pixels)[0],  # type: ignore[operator]
        decode_call=lambda latents: vae.decode(latents, vae.decoder_state()),
        open_decoder=opener(vae.decode, vae.decoder_state),
        open_encoder=opener(vae.encode, vae.encoder_state),
        encode_frame=vae.encode_frame,
        state_bytes=lambda latent: _state_bytes(vae, latent),
        size=size,
    )


def _state_bytes(vae: StreamingVae, latent: Tensor) -> int:
    state = vae.decoder_state()
    vae.decode(latent, state)
    return state.nbytes


def attempt(decode: Step, latents: Tensor) -> Tensor | None:
    """Pixels, or None where the decoder refuses the length; a refusal is an answer, too."""
    try:
        return decode(latents)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as refusal:
        log.info("T=%d refused: %s", latents.shape[2], str(refusal).splitlines()[0])
        return None


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference as a share of `want`'s largest value; NaN counts as infinite."""
    scale = want.abs().max().clamp_min(1e-30)
    error = ((got.double() - want.double()).abs().max() / scale).item()
    return error if error == error else float("inf")


def rms_difference(got: Tensor, want: Tensor) -> float:
    """Root mean square difference as a share of `want`'s root mean square."""
    wide = want.double()
    return (
        (got.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-30)
    ).item()


@contextlib.contextmanager
def exact_arithmetic(module: nn.Module) -> Any:
    """The module in fp64 for the duration: rounding must not be taken for influence."""
    before = next(module.parameters()).dtype
    module.double()
    try:
        yield
    finally:
        module.to(before)
