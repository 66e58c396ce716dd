"""How far back in time a VAE looks: by gradient (structure) and by perturbation (size), per layer and in total.

A forward-mode derivative (a tangent) starts at one input frame and travels with the clip through every layer.
Where it is not zero, the layer's output depends on that input, however little: this is the structural
receptive field, free of rounding. The perturbation beside it says where the dependence is larger than a given
share of the response, which is what a decode that starts too late gets wrong.

By shift-invariance in time the reach forwards of one input is the reach backwards of every later output. The
input is not the clip's first frame, which is special.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanrt.probes.vae_partial import EXACT_SHARE
from wanrt.probes.vae_subject import Subject, attempt, difference, exact_arithmetic

SHARES = (1e-2, 1e-3)  # of the largest response


@dataclass(frozen=True)
class LayerReach:
    """How far behind the perturbed input the output of one layer still depends on it."""

    layer: str
    frames_per_latent: int
    frames: int  # at the layer's own rate, by gradient
    latents: int  # by gradient
    latents_at: dict[str, int]  # by perturbation: share of the largest response -> latents


@dataclass(frozen=True)
class Reach:
    """Question 3 for one half: the temporal receptive field."""

    half: str
    layers: tuple[LayerReach, ...]
    history: (
        int  # decoder: latents before its own that a pixel frame needs; encoder: pixel frames before a latent
    )
    history_by_phase: tuple[int, ...]  # decoder: the same per frame of a latent (the last is the anchor's)
    history_at: dict[str, int]
    future: int  # how many outputs before the input react: 0 when causal
    response: tuple[float, ...]  # decoder: perturbation, share of the peak, per latent after the input
    complete: bool  # False when the clip was too short to see the end


@dataclass(frozen=True)
class WarmUp:
    """How many latents a stateless decode must start early so that its last latent comes out right."""

    errors: tuple[float, ...]  # by number of warm-up latents, share of the scale
    needed: dict[str, int | None]  # bit-equal, rounding, 1e-3, 1e-2 -> warm-up latents
    minimum_t: int | None  # latents a stateless call needs for an answer exact up to rounding


@contextmanager
def _recorded(layers: dict[str, nn.Module], keep: Callable[[str, Any], None]) -> Iterator[None]:
    handles = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _temporal_layers(half: nn.Module) -> dict[str, nn.Module]:
    """Modules in which time is mixed or resampled, in order of execution."""
    from wanrt.models.tiny_vae import MemBlock, TGrow, TPool
    from wanrt.models.vae import CausalConv3d, Downsample, Upsample

    kinds = (Upsample, Downsample, MemBlock, TGrow, TPool)
    return {
        name: module
        for name, module in half.named_modules()
        if isinstance(module, kinds) or (isinstance(module, CausalConv3d) and module.kernel_size[0] == 3)
    }


def _profile(clip: Tensor) -> Tensor:
    """Largest magnitude of every frame."""
    return clip.detach().abs().amax((0, 1, 3, 4))


def _direction(clip: Tensor, index: int) -> Tensor:
    """Noise in frame `index`, nothing elsewhere."""
    direction = torch.zeros_like(clip)
    noise = torch.randn(clip[:, :, 0].shape, generator=torch.Generator().manual_seed(2))
    direction[:, :, index] = noise.to(clip)
    return direction


def _tangents(
    run: Callable[[Tensor], Tensor], half: nn.Module, clip: Tensor, index: int
) -> dict[str, Tensor]:
    """Derivative of every temporal layer's output, and of the output, along a change of input frame `index`."""
    tangents: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        tangent = forward_ad.unpack_dual(out).tangent
        tangents[name] = torch.zeros(out.shape[2]) if tangent is None else _profile(tangent).cpu()

    layers = _temporal_layers(half)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _recorded(layers, keep):
        keep("output", run(forward_ad.make_dual(clip, _direction(clip, index))))
    return tangents


def _changes(run: Callable[[Tensor], Tensor], half: nn.Module, clip: Tensor, index: int) -> dict[str, Tensor]:
    """The same by a finite change."""
    layers = _temporal_layers(half)
    plain, changed = (_outputs(run, layers, x) for x in (clip, clip + 0.5 * _direction(clip, index)))
    return {name: _profile(changed[name] - plain[name]).cpu() for name in plain}


def _gradient(run: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """Largest derivative of the last output frame by every input frame."""
    clip = clip.clone().requires_grad_(True)
    last = run(clip)[:, :, -1]
    weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(6)).to(last)
    (gradient,) = torch.autograd.grad((last * weights).sum(), clip)
    return _profile(gradient).cpu()


@torch.no_grad()
def _outputs(
    run: Callable[[Tensor], Tensor], layers: dict[str, nn.Module], clip: Tensor
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    with _recorded(layers, lambda name, out: outputs.__setitem__(name, out.clone())):
        outputs["output"] = run(clip)
    return outputs


def _last(profile: Tensor, threshold: float = 0.0) -> int:
    """Index of the last frame above the threshold; -1 for none."""
    hits = (profile > threshold).nonzero()
    return int(hits.max()) if len(hits) else -1


@dataclass(frozen=True)
class _Rate:
    """How the frames of one layer map to latents; with `lone_first`, latent 0 has a single frame."""

    per_latent: int
    lone_first: bool

    @classmethod
    def of(cls, frames: int, latents: int) -> _Rate:
        whole = frames % latents == 0
        return cls(frames // latents if whole else (frames - 1) // (latents - 1), not whole)

    def latent(self, frame: int) -> int:
        if not self.lone_first:
            return frame // self.per_latent
        return 0 if frame <= 0 else 1 + (frame - 1) // self.per_latent

    def last_frame(self, latent: int) -> int:
        return latent * self.per_latent if self.lone_first else (latent + 1) * self.per_latent - 1


def decoder_reach(subject: Subject, *, latents: int = 46, at: int = 2) -> Reach:
    """Receptive field of the decoder, on a clip of `latents` with the input at latent `at`, one latent wide."""
    half = getattr(subject.module, "decoder", subject.module)
    with exact_arithmetic(subject.module):
        shape = (1, subject.latent_channels, latents, 1, 1)
        clip = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(
            subject.device, torch.float64
        )
        tangents = _tangents(subject.decode_whole, half, clip, at)
        changes = _changes(subject.decode_whole, half, clip, at)
    output, change = tangents.pop("output"), changes["output"]
    rows = tuple(_layer_row(name, tangents[name], changes[name], latents, at) for name in tangents)
    return _decoder_total(output, change, rows, latents, at, subject.temporal_factor)


def _layer_row(name: str, tangent: Tensor, change: Tensor, latents: int, at: int) -> LayerReach:
    rate = _Rate.of(len(tangent), latents)
    peak = float(change.max())
    at_shares = {f"{share:g}": rate.latent(_last(change, share * peak)) - at for share in SHARES}
    last = _last(tangent)
    return LayerReach(name, rate.per_latent, last - rate.last_frame(at), rate.latent(last) - at, at_shares)


def _decoder_total(
    tangent: Tensor, change: Tensor, rows: tuple[LayerReach, ...], latents: int, at: int, factor: int
) -> Reach:
    rate = _Rate.of(len(tangent), latents)
    phase_of = (torch.arange(len(tangent)) - 1) % factor
    phases = [rate.latent(_last(tangent * (phase_of == phase))) - at for phase in range(factor)]
    peak = float(change.max())
    response = [
        float(change[rate.last_frame(i) - factor + 1 : rate.last_frame(i) + 1].max())
        for i in range(at, latents)
    ]
    first = int((tangent > 0).nonzero().min())
    return Reach(
        half="decoder",
        layers=rows,
        history=max(phases),
        history_by_phase=tuple(phases),
        history_at={f"{share:g}": rate.latent(_last(change, share * peak)) - at for share in SHARES},
        future=max(0, at - rate.latent(first)),
        response=tuple(value / peak for value in response),
        complete=max(phases) + at < latents - 1,
    )


def encoder_reach(subject: Subject, *, latents: int = 36, at: int = 2) -> Reach:
    """Receptive field of the encoder, one latent wide: layers by tangent, the total by the last latent's gradient."""
    assert subject.encode_whole is not None, "asked only of VAEs with streams, which encode"
    factor = subject.temporal_factor
    half = getattr(subject.module, "encoder", subject.module)
    with exact_arithmetic(subject.module):
        pixels = subject.picture(latents, (1, 1))
        gradient = _gradient(subject.encode_whole, pixels)
        tangents = _tangents(subject.encode_whole, half, pixels, factor * at)
        changes = _changes(subject.encode_whole, half, pixels, factor * at)
    output, change = tangents.pop("output"), changes["output"]
    rows = tuple(_layer_row(name, tangents[name], changes[name], latents, at) for name in tangents)
    first = int((gradient > 0).nonzero().min())
    shares = {f"{s:g}": factor * (_last(change, s * float(change.max())) - at) for s in SHARES}
    future = max(0, at - int((output > 0).nonzero().min()))
    return Reach("encoder", rows, pixels.shape[2] - 1 - first, (), shares, future, (), complete=first > 0)


@torch.no_grad()
def warm_up(subject: Subject, *, latents: int = 42, grid: tuple[int, int] | None = None) -> WarmUp:
    """Start a stateless decode 0, 1, 2 ... latents early and compare its last latent with the whole decode's."""
    clip = subject.clip(latents, grid or subject.small_grid)
    truth = subject.decode_whole(clip)[:, :, -subject.temporal_factor :]
    errors, equal = [], []
    for early in range(latents - 1):
        pixels = attempt(subject.decode_whole, clip[:, :, latents - 1 - early :])
        got = truth[:, :, :0] if pixels is None else pixels[:, :, -subject.temporal_factor :]
        complete = got.shape == truth.shape
        errors.append(difference(got, truth) if complete else float("inf"))
        equal.append(complete and torch.equal(got, truth))
    rounding = EXACT_SHARE[subject.dtype]
    needed = {
        "bit-equal": _settles([not e for e in equal]),
        "rounding": _settles([e > rounding for e in errors]),
        "1e-3": _settles([e > 1e-3 for e in errors]),
        "1e-2": _settles([e > 1e-2 for e in errors]),
    }
    exact = needed["rounding"]
    return WarmUp(tuple(errors), needed, None if exact is None else exact + 1)


def _settles(bad: list[bool]) -> int | None:
    """The index from which nothing is bad any more."""
    for index in range(len(bad), 0, -1):
        if bad[index - 1]:
            return index if index < len(bad) else None
    return 0
