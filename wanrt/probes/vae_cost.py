"""Where a VAE's time goes: seconds, arithmetic and bytes per layer, against what the device can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wanrt.probes.live_memory import LiveMemory
from wanrt.probes.vae_partial import synchronise
from wanrt.probes.vae_subject import Subject

QUICK = 1.0  # seconds: what takes longer varies little from run to run, and people wait for it
GROUPS = ("residual", "temporal", "spatial", "attention", "norm", "head", "entry", "glue")


@dataclass(frozen=True)
class LayerCost:
    """One layer (a module without children), or everything between layers: SiLU, sums, upsampling, copies."""

    layer: str
    group: str
    milliseconds: float
    gflop: float
    megabytes: float  # moved: input, output and weights, each once
    live_megabytes: float  # of tensors made during the run, the most held at once while the layer ran

    def floor(self, roof: Roofline) -> float:
        """Milliseconds that the device's measured arithmetic and bandwidth allow."""
        return max(self.gflop / roof.gflops, self.megabytes / 1e3 / roof.gigabytes) * 1e3


@dataclass(frozen=True)
class RunCost:
    """One way to run the decoder (or the encoder), measured."""

    name: str
    latents: int
    frames: int
    milliseconds: float  # without the hooks
    layers: tuple[LayerCost, ...]  # with them

    @property
    def live_megabytes(self) -> float:
        """Of tensors made during the run, the most held at once."""
        return max(row.live_megabytes for row in self.layers)

    def by_group(self) -> dict[str, LayerCost]:
        """Sums per group (of memory the most), largest first."""
        sums = {}
        for group in GROUPS:
            rows = [row for row in self.layers if row.group == group]
            if rows:
                sums[group] = LayerCost(
                    f"{len(rows)} layers",
                    group,
                    milliseconds=sum(row.milliseconds for row in rows),
                    gflop=sum(row.gflop for row in rows),
                    megabytes=sum(row.megabytes for row in rows),
                    live_megabytes=max(row.live_megabytes for row in rows),
                )
        return dict(sorted(sums.items(), key=lambda item: -item[1].milliseconds))


@dataclass(frozen=True)
class Roofline:
    """What the device does at best, measured on large plain operations in the subject's dtype."""

    gflops: float
    gigabytes: float  # copied per second, reads and writes both counted

    def best(self, other: Roofline) -> Roofline:
        """The higher of both: a busy machine measures low, never high."""
        return Roofline(max(self.gflops, other.gflops), max(self.gigabytes, other.gigabytes))


@dataclass(frozen=True)
class Cost:
    """Question 5."""

    size: tuple[int, int]
    dtype: str
    threads: int
    roofline: Roofline
    runs: tuple[RunCost, ...]
    weight_megabytes: float
    state_megabytes: float | None


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Best of a few square matrix products and copies."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    flops = 2 * n**3 / _best(lambda: a @ a, device)
    block = torch.zeros((256 if device.type == "cuda" else 32) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    moved = 2 * block.numel() / _best(lambda: target.copy_(block), device)
    return Roofline(flops / 1e9, moved / 1e9)


def _best(run: Callable[[], Any], device: torch.device, repeats: int = 12) -> float:
    run()
    return min(_seconds(run, device) for _ in range(repeats))


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def group_of(path: str, module: nn.Module) -> str:
    """The group of a layer, by its place in the VAE."""
    parts = path.split(".")
    if "head" in parts:
        return "head"
    if any(part in ("to_qkv", "proj", "attentions") for part in parts) or parts[-1] == "norm":
        return "attention"
    if "time_conv" in parts or (parts[-1] == "conv" and parts[-2].isdigit()):  # TAEHV's TPool and TGrow
        return "temporal"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if "resample" in parts or "resampler" in path:
        return "spatial"
    return "entry" if parts[-1] in ("conv1", "conv2", "conv_in") and len(parts) <= 2 else "residual"


@dataclass
class _Row:
    """What is known of a layer, summed over its calls."""

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    live: int = 0  # the most of any call


@dataclass
class _Clock:
    """Times every layer while the module runs."""

    device: torch.device
    rows: dict[str, _Row]
    started: float = 0.0

    def before(self, *_: Any) -> None:
        synchronise(self.device)
        self.started = time.perf_counter()

    def after(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        synchronise(self.device)
        self.rows.setdefault(path, _Row()).seconds += time.perf_counter() - self.started


@dataclass
class _Counter:
    """Counts every layer's arithmetic, bytes and memory while the module runs."""

    flops: FlopCounterMode
    memory: LiveMemory
    rows: dict[str, _Row]
    started: int = 0
    live_between: int = 0  # the most held while no layer ran

    def before(self, *_: Any) -> None:
        self.started = self.flops.get_total_flops()
        self.end()

    def end(self) -> None:
        """The way to here was between layers."""
        self.live_between = max(self.live_between, self.memory.restart())

    def after(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        row = self.rows.setdefault(path, _Row())
        row.flops += self.flops.get_total_flops() - self.started
        row.bytes += _bytes(inputs, output, module)
        row.live = max(row.live, self.memory.restart())


def _bytes(inputs: tuple[Any, ...], output: Any, module: nn.Module) -> int:
    tensors = [t for t in (*inputs, output, *module.parameters()) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def _metered(subject: Subject, meter: _Clock | _Counter) -> Iterator[None]:
    handles = []
    for path, module in subject.module.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(meter.before))
            hook = lambda m, i, o, path=path: meter.after(path, m, i, o)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_run(subject: Subject, name: str, latents: int, run: Callable[[], Tensor]) -> RunCost:
    """Count arithmetic, bytes and memory of `run`, which also warms it up; time it plainly, then every layer.

    A run of less than `QUICK` seconds is timed plainly twice, and the better time taken.
    """
    device = subject.device
    rows: dict[str, _Row] = {}
    counter = _Counter(FlopCounterMode(display=False), LiveMemory(*subject.module.parameters()), rows)
    with counter.flops, counter.memory, _metered(subject, counter):
        frames = run().shape[2]
        counter.end()
    plain = _seconds(run, device)
    if plain < QUICK:
        plain = min(plain, _seconds(run, device))
    with _metered(subject, _Clock(device, rows)):
        total = _seconds(run, device)
    return RunCost(name, latents, frames, plain * 1e3, _layers(subject, rows, total, counter))


def _layers(
    subject: Subject, rows: dict[str, _Row], total: float, counter: _Counter
) -> tuple[LayerCost, ...]:
    modules = dict(subject.module.named_modules())
    layers = [
        LayerCost(
            path,
            group_of(path, modules[path]),
            row.seconds * 1e3,
            row.flops / 1e9,
            row.bytes / 1e6,
            row.live / 1e6,
        )
        for path, row in rows.items()
    ]
    rest = (total - sum(row.seconds for row in rows.values())) * 1e3
    gflop = (counter.flops.get_total_flops() - sum(row.flops for row in rows.values())) / 1e9
    between = LayerCost(
        "between layers", "glue", max(rest, 0.0), max(gflop, 0.0), 0.0, counter.live_between / 1e6
    )
    return (*layers, between)


@torch.no_grad()
def cost(subject: Subject, *, whole: int | None = None) -> Cost:
    """Time a first latent, a steady latent, three of them, a whole short clip and the anchor's encode."""
    width, height = subject.size
    whole = whole or subject.short_clip
    side = subject.spatial_factor
    shape = (1, subject.latent_channels, whole, height // side, width // side)
    clip = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(subject.device, subject.dtype)
    before = measure_roofline(subject.device, subject.dtype)
    runs = _stream_runs(subject, clip)
    runs.append(measure_run(subject, f"whole clip, T={whole}", whole, lambda: subject.decode_whole(clip)))
    frame = torch.zeros((1, 3, 1, height, width), device=subject.device, dtype=subject.dtype)
    if subject.encode_frame is not None:
        encode = subject.encode_frame
        runs.append(measure_run(subject, "encode one frame", 1, lambda: encode(frame)))
    weights = sum(p.numel() * p.element_size() for p in subject.module.parameters()) / 2**20
    return Cost(
        size=subject.size,
        dtype=str(subject.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        roofline=before.best(measure_roofline(subject.device, subject.dtype)),
        runs=tuple(runs),
        weight_megabytes=weights,
        state_megabytes=None if subject.state_bytes is None else subject.state_bytes(clip[:, :, :1]) / 2**20,
    )


def _stream_runs(subject: Subject, clip: Tensor) -> list[RunCost]:
    if subject.open_decoder is None:
        return []
    one = clip[:, :, :1]
    start = subject.open_decoder
    stream = start()
    stream(one)
    return [
        measure_run(subject, "first latent, T=1", 1, lambda: start()(one)),
        measure_run(subject, "steady latent, T=1", 1, lambda: stream(one)),
        measure_run(subject, "steady chunk, T=3", 3, lambda: stream(clip[:, :, :3])),
    ]
