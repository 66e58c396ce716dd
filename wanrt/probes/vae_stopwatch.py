"""One entrant of `wanrt bench --vae`, timed: every call alone, from an idle device, after its warm-up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from wanrt.probes.vae_entrants import CLIP, Course, Entrant, measured_convolutions

MIB = 2**20


@dataclass(frozen=True)
class Repetitions:
    """How often a call is made: before the measurement, in it, and a whole clip in it."""

    warm_up: int
    calls: int
    clips: int

    @classmethod
    def of(cls, calls: int, warm_up: int, device: torch.device) -> Repetitions:
        """On CUDA ten at least: they cost milliseconds. On a CPU a clip, many latents long, a quarter as often."""
        if device.type == "cuda":
            return cls(warm_up, max(calls, 10), max(calls, 10))
        return cls(warm_up, calls, max(2, calls // 4))

    def of_call(self, name: str) -> tuple[int, int]:
        """Warm-up and measured repetitions of the call."""
        return (1, self.clips) if name == CLIP else (self.warm_up, self.calls)


@dataclass(frozen=True)
class Lap:
    """What was measured of one entrant. Times in nanoseconds, a clip's divided by its latents."""

    dtype: str
    calls: dict[str, list[float]]
    build_s: float  # repacking and capturing included
    warm_up_s: float
    state_mib: float | None
    peak_mib: float | None  # most that the device's allocator held before a whole clip; None on a CPU
    clip_peak_mib: float | None  # and with it
    pixels: Tensor  # of the first latents, on the CPU


@torch.inference_mode()
def time_entrant(
    opener: Callable[[Course], Entrant],
    course: Course,
    repetitions: Repetitions,
    *,
    tuned: bool,
    shown: int,
) -> Lap:
    """Builds, warms up and measures one entrant, which nothing outlives.

    tuned: cuDNN times its algorithms for it, as wanrt does for itself where it needs to. shown: latents whose
    pixels are kept. Raises `UnavailableError` as the opener.
    """
    _forget(course.device)
    began = time.perf_counter()
    with torch.inference_mode(mode=False), torch.no_grad():
        entrant = opener(course)
    _settle(course.device)
    built_s = time.perf_counter() - began
    watch = _Watch(course.device, repetitions)
    with measured_convolutions() if tuned else nullcontext():
        streaming = {name: call for name, call in entrant.calls.items() if name != CLIP}
        calls = {name: watch.measure(name, call) for name, call in streaming.items()}
        peak = _peak(course.device) if streaming else None
        whole = watch.measure(CLIP, entrant.calls[CLIP])
        calls[CLIP] = [time_ns / course.latents.shape[2] for time_ns in whole]
        pixels = entrant.decode_clip(course.latents[:, :, :shown]).float().cpu()
    return Lap(
        dtype=str(entrant.dtype).removeprefix("torch."),
        calls=calls,
        build_s=built_s,
        warm_up_s=watch.warm_up_s,
        state_mib=None if entrant.state_bytes is None else entrant.state_bytes() / MIB,
        peak_mib=peak,
        clip_peak_mib=_peak(course.device),
        pixels=pixels,
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside the block kernels that ask for no device go to this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Euclidean norms over all pixels."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


class _Watch:
    """Warms a call up, then times it; `warm_up_s` is what the warm-ups took so far."""

    def __init__(self, device: torch.device, repetitions: Repetitions) -> None:
        self._device, self._repetitions = device, repetitions
        self.warm_up_s = 0.0

    def measure(self, name: str, call: Callable[[], object]) -> list[float]:
        """Nanoseconds of every measured repetition."""
        warm_up, measured = self._repetitions.of_call(name)
        began = time.perf_counter()
        for _ in range(warm_up):
            call()
        _settle(self._device)
        self.warm_up_s += time.perf_counter() - began
        return [_once(call, self._device) for _ in range(measured)]


def _once(call: Callable[[], object], device: torch.device) -> float:
    """By events on CUDA, by the host's clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter_ns()
        call()
        return float(time.perf_counter_ns() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    start.record(stream)
    call()
    end.record(stream)
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e6


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    """Memory of the entrant before goes back, or it would count for this one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else None
