"""A Wan VAE split over the bands of a picture, from outside: a plan that is data, and hooks that follow it.

Each rank runs the untouched module on its band plus one halo line towards each neighbour, and so keeps the state of
just those lines. The rule behind the plan: **whatever a block is given, its halo lines are right.** Pointwise work
(norms, SiLU, time convolutions, skips) keeps that; the others are put right behind, or in front:

    3x3x3 convolution   its halo lines are garbage (they lack the neighbour's second line): overwritten in place by
                        the neighbours' results, which saves every copy that cropping and padding would cost. Halo
                        rows wanrt's Hopper kernel leaves out; halo columns, and all halo lines under cuDNN, are
                        computed for nothing.
    nearest x2 + 3x3    two halo lines of which the inner one is right, since both came from a right one: the outer is
                        dropped, in `FastVae` by the next block when it reads. No exchange.
    3x3, stride 2       padded right and below only, so the halo line in front is dropped; new halos are exchanged.
    attention           gathers its small map (C channels; keys and values would be 2 C). In `FastVae` every rank makes
                        keys and values of all of it, and asks for its own and its halo lines only. In `WanVae` every
                        rank computes it whole: 0.3 % of the arithmetic of a decode at 576x320, 0.5 % at 832x480.
    whole half          halos are added in front and dropped behind.

The halo lines of the two remembered frames are kept in the slots, not exchanged: a convolution then exchanges T lines
instead of T + 2, that is a third at latent size and two thirds at full size, for 2/height more state.

The same rules hold for `WanVae` and for `FastVae`, whose blocks hand `Pending` values on; inside CUDA graphs the
exchanges are captured with the rest. A decode exchanges 31 times, so what counts is what one exchange costs, not its
bytes: where GPUs reach each other's memory a kernel stores the lines there (`PeerNeighbours`), elsewhere they are
messages (`GroupNeighbours`), which at 576x320 took 0.9 ms of a decode's 7.85 on two H100s. Bands are cut along the
axis that wastes less of the convolution's tiles (`vae_axis`). `tests/parallel/test_vae_split_gpu.py` says how much
faster two GPUs are than one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from wanrt.models.vae import AttentionBlock, CausalConv3d, Decoder, Encoder, VaeState, WanVae
from wanrt.models.vae_fast import (
    FastConv,
    FastDownsample,
    FastHalf,
    FastUpsample,
    FastVae,
    Pending,
)
from wanrt.models.vae_graph import GraphedVae
from wanrt.parallel.bands import Band, Neighbours, Seam
from wanrt.parallel.vae_axis import Axis

PIXELS_PER_LATENT = 8


class Treatment(StrEnum):
    """What happens around a module's call. See the head of this file."""

    REFRESH = "refresh"
    TRIM = "trim"
    SHIFT = "shift"
    WHOLE = "whole"
    FRAME = "frame"


@dataclass(frozen=True)
class Rule:
    """Modules of this type whose dotted name matches `modules` (regular expression) get this treatment."""

    kind: type[nn.Module]
    modules: str
    treatment: Treatment


PLAIN = (
    Rule(CausalConv3d, r"(en|de)coder\..*(conv1|residual\.[26])", Treatment.REFRESH),
    Rule(nn.Conv2d, r"decoder\..*resample\.1", Treatment.TRIM),
    Rule(nn.Conv2d, r"encoder\..*resample\.1", Treatment.SHIFT),
    Rule(AttentionBlock, r".*", Treatment.WHOLE),
    Rule(Encoder, r".*", Treatment.FRAME),
    Rule(Decoder, r".*", Treatment.FRAME),
)
FAST = (
    Rule(FastConv, r"(en|de)coder\.(blocks\.\d+\.)?conv[12]", Treatment.REFRESH),
    Rule(FastUpsample, r".*", Treatment.TRIM),
    Rule(FastDownsample, r".*", Treatment.SHIFT),
    Rule(nn.Identity, r".*\.around", Treatment.WHOLE),
    Rule(FastHalf, r".*", Treatment.FRAME),
)


def split(vae: WanVae | FastVae, band: Band, neighbours: Neighbours) -> None:
    """Hook a whole VAE so that it computes one band. Weights stay whole; only inference.

    From then on its `decode` takes the band of a latent and gives the band of its pixels, `encode` and
    `encode_frame` the other way; all ranks of the split must make the same calls. `SplitVae` does that for whole
    latents.
    """
    plain = isinstance(vae, WanVae)
    dim = (-2 if band.axis is Axis.ROWS else -1) - (0 if plain else 1)  # [..., H, W] or [..., H, W, C]
    treat = (_treat_plain if plain else _treat_fast)(Seam(band, neighbours, dim))
    for name, module in vae.named_modules():
        treatment = _treatment(name, module, PLAIN if plain else FAST)
        if treatment is not None:
            before, after = treat[treatment]
            if before is not None:
                module.register_forward_pre_hook(_first_argument(before))
            module.register_forward_hook(_result(after))
            if isinstance(module, FastConv) and band.axis is Axis.ROWS:
                module.unread = (band.before, band.after)


def _treatment(name: str, module: nn.Module, rules: tuple[Rule, ...]) -> Treatment | None:
    found = (r.treatment for r in rules if type(module) is r.kind and re.fullmatch(r.modules, name))
    return next(found, None)


Change = Callable[[Any], Any]
Treatments = dict[
    Treatment, tuple[Change | None, Change]
]  # what to do to the first argument, and to the result


def _first_argument(change: Change) -> Callable[..., Any]:
    return lambda module, arguments: (change(arguments[0]), *arguments[1:])


def _result(change: Change) -> Callable[..., Any]:
    return lambda module, arguments, result: change(result)


def _treat_plain(seam: Seam) -> Treatments:
    return {
        Treatment.REFRESH: (None, seam.refresh),
        Treatment.TRIM: (None, lambda x: _packed(seam.inner(x))),
        Treatment.SHIFT: (seam.without_first, lambda x: _packed(seam.extend(x))),
        Treatment.WHOLE: (lambda x: _packed(seam.whole(x)), lambda x: _packed(seam.cut(x))),
        Treatment.FRAME: (lambda x: _packed(seam.extend(x)), seam.inner),
    }


def _packed(x: Tensor) -> Tensor:
    """`x` without gaps, in the strides that clips and frames have in the VAE."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _treat_fast(seam: Seam) -> Treatments:
    def on_finished(change: Change) -> Change:
        return lambda pending: Pending(change(_finished(pending)).contiguous())

    def trim(pending: Pending) -> Pending:
        before, after = seam.band.before, seam.band.after
        rows = seam.band.axis is Axis.ROWS
        return replace(pending, margin=(before, after, 0, 0) if rows else (0, 0, before, after))

    return {
        Treatment.REFRESH: (None, seam.refresh),
        Treatment.TRIM: (None, trim),
        Treatment.SHIFT: (on_finished(seam.without_first), lambda p: replace(p, x=seam.extend(p.x))),
        Treatment.WHOLE: (None, seam.whole),
        Treatment.FRAME: (seam.extend, seam.inner),
    }


def _finished(pending: Pending) -> Tensor:
    total = pending.finish()[1]
    assert total is not None
    return total


class SplitVae:
    """One band's part in decoding whole latents and encoding whole frames. Every rank makes the same calls.

    Args:
        vae: already `split` for `band`; or its calls as graphs of the band's size.
        band: of this rank.
        neighbours: the split's ranks.
    """

    def __init__(self, vae: WanVae | FastVae | GraphedVae, band: Band, neighbours: Neighbours) -> None:
        self.vae, self.band = vae, band
        self.seam = Seam(band, neighbours, -2 if band.axis is Axis.ROWS else -1)

    def decoder_state(self) -> VaeState:
        """A fresh state of this band of one stream."""
        return self.vae.decoder_state()

    def decode(self, latents: Tensor, state: VaeState) -> Tensor:
        """Whole latents `[1, z, T, h, w]`, the same on every rank, to this band of their pixels.

        Frames as in `WanVae.decode`. Raises `ValueError` for latents of another size than the split's.
        """
        lines = latents.shape[self.seam.dim]
        if lines != self.band.bounds[-1]:
            raise ValueError(
                f"got a latent of {lines} {self.band.axis}, expected {self.band.bounds[-1]}: split for its size"
            )
        return self.vae.decode(self.band.part(latents, self.seam.dim), state)

    def encode_frame(self, pixels: Tensor) -> Tensor:
        """This band of a lone frame to the whole latent `[1, z, 1, h, w]`, on every rank."""
        own = self.vae.encode_frame(pixels)
        return self.seam.neighbours.gather(own, self.band.lengths, self.seam.dim)

    def close(self) -> None:
        """Gives up the graphs, if there are any: comes before the process group is left."""
        if isinstance(self.vae, GraphedVae):
            self.vae.close()

    def collect(self, pixels: Tensor) -> Tensor | None:
        """Whole pixels of every rank's band, on the first rank; None on the others."""
        lengths = [n * PIXELS_PER_LATENT for n in self.band.lengths]
        return self.seam.neighbours.collect(pixels, lengths, self.seam.dim)
