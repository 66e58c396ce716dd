"""Can part of a clip be decoded: one latent alone, without its future, and by which workaround?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from wanrt.probes.vae_subject import Step, Subject, attempt, difference, rms_difference

EXACT_SHARE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference, as a share of the scale, that counts as rounding: some 40 layers deep, per dtype."""


class Verdict(StrEnum):
    """Answer to a question of can or cannot."""

    YES = "YES"
    CONDITIONAL = "CONDITIONAL"
    NO = "NO"


@dataclass(frozen=True)
class StepResult:
    """One latent decoded by itself, against the same pixel frames of the whole decode."""

    latent: int
    frames: int
    expected_frames: int
    error: float  # against the whole clip decoded in one go, without state
    bit_identical: bool | None  # with the decode that users call; None where shapes differ


@dataclass(frozen=True)
class SingleLatent:
    """Question 1: can T=1 be decoded?"""

    fresh: tuple[StepResult, ...]  # each latent alone, from nothing
    carried: tuple[StepResult, ...]  # one after the other, with the state carried; empty without streams
    again: tuple[StepResult, ...]  # without streams: each with everything before it decoded again
    tolerance: float
    verdict: Verdict
    condition: str


@dataclass(frozen=True)
class Causality:
    """Question 2: does a change reach back in time? `change[i][t]`: input i perturbed, output t's difference."""

    half: str
    change: tuple[tuple[float, ...], ...]
    bleed: float  # the largest change of an output that comes before its input
    causal: bool
    last_frame_error: float | None  # decoder: last pixel frame of a T=1 decode against the whole decode


@dataclass(frozen=True)
class Workaround:
    """Question 4: one way to decode the newest latent without a carried state (and with, as the yardstick)."""

    name: str
    latents_decoded: int
    error: float  # largest, share of the scale
    rms: float
    milliseconds: float


def frame_span(latent: int, factor: int) -> slice:
    """Pixel frames of a latent in a clip whose first latent is one frame."""
    return slice(0, 1) if latent == 0 else slice(1 + factor * (latent - 1), 1 + factor * latent)


@torch.no_grad()
def single_latent(
    subject: Subject, *, latents: int | None = None, grid: tuple[int, int] | None = None
) -> SingleLatent:
    """Decode every latent of a short clip alone, fresh and with carried state, and judge."""
    clip = subject.clip(latents or subject.short_clip, grid or subject.grid)
    whole = subject.decode_whole(clip).clamp(-1, 1)
    called = subject.decode_call(clip).clamp(-1, 1)
    fresh = _steps(clip, whole, called, subject, lambda: subject.decode_call)
    carried: tuple[StepResult, ...] = ()
    again: tuple[StepResult, ...] = ()
    if subject.open_decoder is not None:
        stream = subject.open_decoder()
        carried = _steps(clip, whole, called, subject, lambda: stream)
    else:
        again = _again(clip, whole, called, subject)
    tolerance = EXACT_SHARE[subject.dtype]
    verdict, condition = judge_single(fresh, carried, again, tolerance)
    return SingleLatent(fresh, carried, again, tolerance, verdict, condition)


def _steps(
    clip: Tensor, whole: Tensor, called: Tensor, subject: Subject, stepper: Callable[[], Step]
) -> tuple[StepResult, ...]:
    results = []
    for latent, piece in enumerate(clip.split(1, dim=2)):
        pixels = attempt(stepper(), piece)
        span = _span_in(whole, clip, latent, subject)
        results.append(_compare(latent, pixels, whole[:, :, span], called[:, :, span]))
    return tuple(results)


def _span_in(whole: Tensor, clip: Tensor, latent: int, subject: Subject) -> slice:
    """Frames of a latent, for decoders with and without a special first frame."""
    factor = subject.temporal_factor
    if whole.shape[2] == clip.shape[2] * factor and factor > 1:
        return slice(latent * factor, (latent + 1) * factor)
    return frame_span(latent, factor)


def _again(clip: Tensor, whole: Tensor, called: Tensor, subject: Subject) -> tuple[StepResult, ...]:
    """The newest latent of every prefix."""
    results = []
    for latent in range(clip.shape[2]):
        pixels = attempt(subject.decode_call, clip[:, :, : latent + 1])
        span = _span_in(whole, clip, latent, subject)
        if pixels is not None and pixels.shape[2] == span.stop:
            pixels = pixels[:, :, span]
        results.append(_compare(latent, pixels, whole[:, :, span], called[:, :, span]))
    return tuple(results)


def _compare(latent: int, pixels: Tensor | None, want: Tensor, called: Tensor) -> StepResult:
    """Against the last frames of the latent, as many as came out."""
    if pixels is None:
        return StepResult(latent, 0, want.shape[2], float("inf"), None)
    frames = min(pixels.shape[2], want.shape[2])
    got = pixels[:, :, -frames:].clamp(-1, 1)
    same = torch.equal(got, called[:, :, -frames:]) if pixels.shape[2] == want.shape[2] else None
    return StepResult(latent, pixels.shape[2], want.shape[2], difference(got, want[:, :, -frames:]), same)


def judge_single(
    fresh: tuple[StepResult, ...],
    carried: tuple[StepResult, ...],
    again: tuple[StepResult, ...],
    tolerance: float,
) -> tuple[Verdict, str]:
    """The verdict on T=1 from what was measured."""

    def good(steps: tuple[StepResult, ...]) -> bool:
        return all(s.frames == s.expected_frames and s.error <= tolerance for s in steps)

    if good(fresh):
        return Verdict.YES, "every latent decodes alone, from nothing"
    if carried and good(carried):
        bits = all(step.bit_identical for step in carried)
        how = "bit for bit" if bits else f"up to {max(s.error for s in carried):.1e} of the scale"
        return Verdict.CONDITIONAL, (
            f"exact ({how}) if the decoder's state is carried from the clip's first latent on; from a fresh state "
            f"a later latent gives {_count(fresh[-1].frames)} instead of {fresh[-1].expected_frames}, and wrong"
        )
    if carried:
        bad = next(s for s in carried if s.error > tolerance or s.frames != s.expected_frames)
        return Verdict.NO, (
            f"with carried state latent {bad.latent} already departs from the whole decode: "
            f"{_count(bad.frames)}, error {bad.error:.2g} of the scale"
        )
    if again and good(again):
        return Verdict.CONDITIONAL, (
            "its interface carries no state: exact only with everything before decoded again, at a cost that grows"
        )
    if fresh[-1].frames == 0:
        return Verdict.NO, "its interface carries no state, and refuses one latent alone"
    return Verdict.NO, (
        f"its interface carries no state, and a later latent alone gives {_count(fresh[-1].frames)} "
        f"instead of {fresh[-1].expected_frames}, error {fresh[-1].error:.2g} of the scale"
    )


def _count(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"


@torch.no_grad()
def decoder_causality(
    subject: Subject, *, latents: int | None = None, grid: tuple[int, int] | None = None
) -> Causality:
    """Perturb each latent of a clip and watch every pixel frame of the whole decode."""
    latents = latents or subject.short_clip
    clip = subject.clip(latents, grid or subject.grid)
    change = perturb_each(subject.decode_whole, clip)
    whole = subject.decode_whole(clip).clamp(-1, 1)
    starts = [_span_in(whole, clip, latent, subject).start for latent in range(latents)]
    return _causality("decoder", change, starts, _last_frame_error(subject, clip, whole))


def _last_frame_error(subject: Subject, clip: Tensor, whole: Tensor) -> float | None:
    """The frame that becomes the anchor: the last one of a T=1 decode with carried state."""
    if subject.open_decoder is None:
        return None
    stream = subject.open_decoder()
    pieces = [stream(piece) for piece in clip.split(1, dim=2)]
    return max(
        difference(
            piece[:, :, -1].clamp(-1, 1), whole[:, :, _span_in(whole, clip, latent, subject)][:, :, -1]
        )
        for latent, piece in enumerate(pieces)
    )


@torch.no_grad()
def encoder_causality(
    subject: Subject, *, latents: int = 4, grid: tuple[int, int] | None = None
) -> Causality | None:
    """Perturb each pixel frame of a clip and watch every latent of the whole encode."""
    if subject.encode_whole is None:
        return None
    pixels = subject.picture(latents, grid or subject.grid)
    change = perturb_each(subject.encode_whole, pixels)
    # the latent that a frame belongs to
    starts = [-(-frame // subject.temporal_factor) for frame in range(pixels.shape[2])]
    return _causality("encoder", change, starts, None)


def perturb_each(run: Step, clip: Tensor, amount: float = 0.5) -> tuple[tuple[float, ...], ...]:
    """For each input frame replaced by noise: the change of every output frame, as a share of the scale."""
    plain = run(clip)
    scale = plain.abs().max()
    noise = torch.randn(clip[:, :, 0].shape, generator=torch.Generator().manual_seed(1)).to(clip)
    rows = []
    for index in range(clip.shape[2]):
        changed = clip.clone()
        changed[:, :, index] += amount * noise
        rows.append(tuple(((run(changed) - plain).abs().amax((0, 1, 3, 4)) / scale).tolist()))
    return tuple(rows)


def _causality(
    half: str, change: tuple[tuple[float, ...], ...], starts: list[int], last: float | None
) -> Causality:
    early = [max(row[:start], default=0.0) for row, start in zip(change, starts, strict=True)]
    bleed = max(early)
    return Causality(half, change, bleed, bleed <= 1e-6, last)


@torch.no_grad()
def workarounds(
    subject: Subject, *, latents: int = 18, grid: tuple[int, int] | None = None
) -> tuple[Workaround, ...]:
    """Decode the newest latent of a clip in every way that needs no history, and with carried state."""
    clip = subject.clip(latents, grid or subject.grid)
    truth = subject.decode_whole(clip).clamp(-1, 1)[:, :, -subject.temporal_factor :]
    rows = []
    if subject.open_decoder is not None:
        rows.append(_carried(subject, clip, truth))
    newest, zeros = clip[:, :, -1:], torch.zeros_like(clip[:, :, -1:])
    candidates = {"T=1 alone": newest, "T=2, first discarded": clip[:, :, -2:]}
    candidates |= {f"overlap of {n}": clip[:, :, -1 - n :] for n in (2, 4, 8, 16) if n < latents}
    for name, pad in (("repeat-pad", newest), ("zero-pad", zeros)):
        candidates |= {f"{name} by {n}": torch.cat([pad] * n + [newest], dim=2) for n in (1, 3)}
    for name, window in candidates.items():
        rows.append(_measure(name, window, truth, subject, partial(attempt, subject.decode_whole)))
    return tuple(rows)


def _carried(subject: Subject, clip: Tensor, truth: Tensor) -> Workaround:
    assert subject.open_decoder is not None
    stream = subject.open_decoder()
    for piece in clip[:, :, :-1].split(1, dim=2):
        stream(piece)
    return _measure("carried state", clip[:, :, -1:], truth, subject, stream)


def _measure(
    name: str, window: Tensor, truth: Tensor, subject: Subject, run: Callable[[Tensor], Tensor | None]
) -> Workaround:
    synchronise(subject.device)
    start = time.perf_counter()
    pixels = run(window)
    synchronise(subject.device)
    spent = (time.perf_counter() - start) * 1e3
    if pixels is None:
        return Workaround(name, window.shape[2], float("inf"), float("inf"), spent)
    frames = min(pixels.shape[2], truth.shape[2])
    got, want = pixels[:, :, -frames:].clamp(-1, 1), truth[:, :, -frames:]
    return Workaround(name, window.shape[2], difference(got, want), rms_difference(got, want), spent)


def synchronise(device: torch.device) -> None:
    """Wait for the device, where there is anything to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
