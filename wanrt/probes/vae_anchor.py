"""The anchor: what becomes of a latent that is decoded, and whose last frame is encoded again as a first frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt.probes.vae_subject import Subject, rms_difference


@dataclass(frozen=True)
class RoundTrip:
    """State of the picture after so many times encode and decode."""

    count: int
    latent_rms: float  # against the first encoding, share of its root mean square
    psnr: float  # dB against the first frame, peak to peak 2


@dataclass(frozen=True)
class Anchor:
    """Question 6. Errors are root mean square, as a share of the reference's root mean square."""

    against_replaced: float  # anchor latent against the latent whose last frame it encodes
    against_fresh: float  # against the encoding of the true last frame as a first frame: what one trip costs
    stream_against_fresh: float  # the replaced latent itself against that: what being "first" changes
    trips: tuple[RoundTrip, ...]


@torch.no_grad()
def anchor(subject: Subject, *, trips: int = 20, grid: tuple[int, int] | None = None) -> Anchor | None:
    """Encode a clip, decode it, encode the last frame of its second-to-last latent alone, compare; then repeat.

    None for a VAE whose encoder takes no lone frame.
    """
    if subject.encode_frame is None or subject.encode_whole is None:
        return None
    latents, factor = 5, subject.temporal_factor
    if grid is None and subject.paint is not None:  # at the size it was trained on
        grid = (subject.size[0] // subject.spatial_factor, subject.size[1] // subject.spatial_factor)
    pixels = subject.picture(latents, grid or subject.grid, familiar=True)
    clip = subject.encode_whole(pixels)
    at = latents - 2
    frame = factor * at  # last pixel frame of latent `at`
    decoded = subject.decode_whole(clip).clamp(-1, 1)[:, :, frame : frame + 1]
    fresh = subject.encode_frame(pixels[:, :, frame : frame + 1])
    made = subject.encode_frame(decoded)
    replaced = clip[:, :, at : at + 1]
    return Anchor(
        against_replaced=rms_difference(made, replaced),
        against_fresh=rms_difference(made, fresh),
        stream_against_fresh=rms_difference(replaced, fresh),
        trips=_repeat(subject, pixels[:, :, frame : frame + 1], trips),
    )


def _repeat(subject: Subject, frame: Tensor, trips: int) -> tuple[RoundTrip, ...]:
    assert subject.encode_frame is not None
    first = subject.encode_frame(frame)
    latent, rows = first, []
    for count in range(1, trips + 1):
        picture = subject.decode_whole(latent).clamp(-1, 1)
        latent = subject.encode_frame(picture)
        rows.append(RoundTrip(count, rms_difference(latent, first), psnr(picture, frame)))
    return tuple(rows)


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal to noise ratio in dB of pixels in [-1, 1]; 99 for equal pictures."""
    mse = (got.double() - want.double()).square().mean().item()
    return 99.0 if mse == 0 else min(99.0, 10 * math.log10(4 / mse))
