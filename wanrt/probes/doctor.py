"""What this machine can do for wanrt: facts found by trying, each with a verdict and, where it is bad, a remedy.

Every check is a function of its own that returns `Check` rows; `examine` runs them all. A check that fails to run
is a row that says so, never an end of the report.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.script import Preset

log = logging.getLogger("wanrt.probes")

GIB = 1 << 30
PATIENCE = 8 * GIB  # nobody waits for a larger model on a CPU
PACKAGES = (
    "torch", "triton", "av", "numpy", "tokenizers", "safetensors", "pydantic", "typer", "rich", "huggingface_hub"
)  # fmt: skip

# cuDNN versions as (major, minor), and what bf16 conv3d does there. Wrong results from 9.8 on, gone in 9.13:
# pytorch/pytorch #163539. From torch 2.9 on, PyTorch therefore goes around cuDNN before 9.15, which is slow and
# takes several times the memory: pytorch/pytorch #166643.
CONV3D_WRONG = ((9, 8), (9, 13))
CONV3D_SLOW_BELOW = (9, 15)


class Verdict(StrEnum):
    """How a check came out."""

    GOOD = "ok"
    NOTE = "note"  # works, but the user should know
    BAD = "bad"
    FACT = "-"  # no judgement


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, what was found, what to do about it."""

    section: str
    name: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. Memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    free: int


def examine(weights: Path | None = None, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """Every check. `weights` is a directory to look into first. Takes some seconds; loads no model."""
    gpus = find_gpus()
    sections: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("versions", versions),
        ("devices", lambda: devices(gpus)),
        ("links", lambda: links(gpus)),
        ("cudnn", lambda: cudnn(gpus)),
        ("fp8", lambda: fp8(gpus)),
        ("encoders", encoders),
        ("terminal", lambda: terminal(environ)),
        ("presets", lambda: presets(gpus, weights, environ)),
    )
    return [row for name, checks in sections for row in _guarded(name, checks)]


def _guarded(section: str, checks: Callable[[], Iterator[Check]]) -> list[Check]:
    """The section's rows; a check that breaks becomes a row itself."""
    rows: list[Check] = []
    try:
        rows += checks()
    except Exception as broken:
        log.debug("%s could not be examined", section, exc_info=broken)
        why = " ".join(f"{type(broken).__name__}: {broken}".split())
        rows.append(
            Check(section, "examination", Verdict.BAD, f"could not be done: {why} (--debug shows where)")
        )
    return rows


def versions() -> Iterator[Check]:
    """Python, packages, and both FFmpegs."""
    from wanrt import __version__

    section = "versions"
    yield Check(section, "wanrt", Verdict.FACT, __version__)
    yield Check(
        section, "python", Verdict.FACT, f"{platform.python_version()}, {platform.platform(terse=True)}"
    )
    for package in PACKAGES:
        version = _version(package)
        optional = package in ("triton", "huggingface_hub")
        verdict = Verdict.FACT if version else Verdict.NOTE if optional else Verdict.BAD
        yield Check(section, package, verdict, version or f"not installed: pip install {package}")
    yield Check(section, "ffmpeg", Verdict.FACT, _bundled_ffmpeg())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _bundled_ffmpeg() -> str:
    import imageio_ffmpeg

    return f"{imageio_ffmpeg.get_ffmpeg_version()} (imageio-ffmpeg's, for what PyAV's build lacks)"


def find_gpus() -> list[Gpu]:
    """The CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(index, about.name, (about.major, about.minor), total, free))
    return found


def devices(gpus: list[Gpu]) -> Iterator[Check]:
    """Processor, memory, GPUs."""
    import psutil

    from wanrt.pipeline.devices import usable_cores

    memory = psutil.virtual_memory()
    text = f"{usable_cores()} cores, {memory.total / GIB:.1f} GiB of memory, {memory.available / GIB:.1f} GiB free"
    yield Check("devices", "cpu", Verdict.GOOD, text)
    for gpu in gpus:
        capability = ".".join(map(str, gpu.capability))
        text = f"{gpu.name}, SM {capability}, {gpu.memory / GIB:.1f} GiB, {gpu.free / GIB:.1f} GiB free"
        busy = gpu.free < gpu.memory * 0.9
        verdict = Verdict.NOTE if busy else Verdict.GOOD
        yield Check("devices", f"cuda:{gpu.index}", verdict, text + (" (in use by others)" if busy else ""))
    if not gpus:
        yield Check("devices", "cuda", Verdict.NOTE, f"no CUDA device: {_why_no_cuda()}")


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one from pytorch.org/get-started for GPUs"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver found (no nvidia-smi)"
    return "the driver sees none, or is too old for this torch; nvidia-smi says more"


def links(gpus: list[Gpu]) -> Iterator[Check]:
    """Whether each pair of GPUs reaches the other's memory, and how fast a copy is."""
    import torch

    for a in gpus:
        for b in gpus[a.index + 1 :]:
            direct = torch.cuda.can_device_access_peer(a.index, b.index)
            rate = copy_rate(a.index, b.index)
            how = (
                "peer to peer"
                if direct
                else "through host memory; Ulysses will beat tensor parallelism by far"
            )
            verdict = Verdict.GOOD if direct else Verdict.NOTE
            yield Check("links", f"cuda:{a.index} - cuda:{b.index}", verdict, f"{how}, {rate:.0f} GB/s")


def copy_rate(a: int, b: int, size: int = 256 << 20) -> float:
    """GB/s of a copy of `size` bytes from device `a` to device `b`, best of three."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=f"cuda:{a}")
    target = torch.empty(size, dtype=torch.uint8, device=f"cuda:{b}")
    best = float("inf")
    for _ in range(4):  # the first one sets up the mapping
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(a):
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return size / best / 1e6


def cudnn(gpus: list[Gpu]) -> Iterator[Check]:
    """cuDNN's version and what it means for the VAE; on a GPU, a bf16 conv3d against fp32."""
    import torch

    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None:
        yield Check("cudnn", "cudnn", Verdict.FACT, "not part of this torch (it is built without CUDA)")
        return
    verdict, text = judge_cudnn(version)
    yield Check("cudnn", "cudnn", verdict, text)
    for gpu in gpus[:1]:
        error = conv3d_error(gpu.index)
        good = error < CONV3D_TOLERANCE
        text = f"differs from fp32 by {error:.1e} of the scale" + (
            "" if good else ": wrong; use --precision fp32"
        )
        yield Check("cudnn", "bf16 conv3d", Verdict.GOOD if good else Verdict.BAD, text)


def judge_cudnn(version: int) -> tuple[Verdict, str]:
    """What a cuDNN version (91500 is 9.15.0) does to bf16 conv3d."""
    major, minor = version // 10000, version // 100 % 100
    words = f"{major}.{minor}.{version % 100}"
    remedy = "pip install -U 'nvidia-cudnn-cu12>=9.15'"
    if CONV3D_WRONG[0] <= (major, minor) < CONV3D_WRONG[1]:
        return Verdict.BAD, f"{words} computes some bf16 conv3d wrongly (pytorch #163539): {remedy}"
    if CONV3D_WRONG[1] <= (major, minor) < CONV3D_SLOW_BELOW:
        return (
            Verdict.NOTE,
            f"{words}: torch avoids its bf16 conv3d, slow and large (pytorch #166643): {remedy}",
        )
    return Verdict.GOOD, words


FP8_TOLERANCE = 4e-3  # relative, by norm: the product rounds once, to bf16


def fp8(gpus: list[Gpu]) -> Iterator[Check]:
    """Whether each GPU can multiply for --precision fp8, by doing it."""
    import torch

    from wanrt.models.fp8 import product_error, why_no_fp8

    for gpu in gpus:
        device, name = torch.device("cuda", gpu.index), f"cuda:{gpu.index} product"
        if reason := why_no_fp8(device):
            yield Check("fp8", name, Verdict.FACT, f"none: {reason}")
            continue
        error = product_error(device)
        good = error < FP8_TOLERANCE
        text = f"differs from fp32 by {error:.1e}" + ("" if good else ": wrong; do not use --precision fp8")
        yield Check("fp8", name, Verdict.GOOD if good else Verdict.BAD, text)


CONV3D_TOLERANCE = 2e-2  # of the output's scale: bf16 has 8 bits, and 2592 products are summed in fp32


def conv3d_error(index: int) -> float:
    """Largest error of one of the VAE's bf16 convolutions (96 channels, 3x3x3, 320x576), relative to its scale."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator(f"cuda:{index}").manual_seed(0)
    x = torch.randn(1, 96, 3, 320, 576, device=f"cuda:{index}", generator=generator)
    w = torch.randn(96, 96, 3, 3, 3, device=f"cuda:{index}", generator=generator) / 51
    exact = F.conv3d(x.bfloat16().float(), w.bfloat16().float(), padding=(0, 1, 1))
    got = F.conv3d(x.bfloat16(), w.bfloat16(), padding=(0, 1, 1)).float()
    return float((got - exact).abs().max() / exact.abs().max())


def encoders() -> Iterator[Check]:
    """Every encoder, by encoding a few frames."""
    import av

    from wanrt.output.encoder import ENCODERS, EncoderSettings, trial_encode
    from wanrt.output.spec import VideoSpec

    spec = VideoSpec(256, 160, Fraction(16))  # small, but above what hardware encoders refuse
    for codec, kinds in ENCODERS.items():
        for kind in kinds:
            name = f"{codec} {kind.name}"
            if kind.name not in av.codecs_available:
                verdict, text = Verdict.FACT, "not in PyAV's FFmpeg"
            else:
                reason = trial_encode(EncoderSettings(kind, spec, kind.options(23)))
                bad = Verdict.FACT if kind.hardware else Verdict.BAD
                verdict, text = (bad, f"does not work: {reason}") if reason else (Verdict.GOOD, "works")
            yield Check("encoders", name, verdict, text)


def terminal(environ: Mapping[str, str]) -> Iterator[Check]:
    """Whether the panel can be drawn."""
    from wanrt.panel.observer import terminal_size, why_not_live

    obstacle = why_not_live(sys.stderr, environ)
    if obstacle:
        yield Check("terminal", "panel", Verdict.FACT, f"plain lines instead: {obstacle}")
        return
    columns, rows = terminal_size(sys.stderr)
    colours = "no colours (NO_COLOR)" if environ.get("NO_COLOR") else "colours"
    yield Check("terminal", "panel", Verdict.GOOD, f"{columns}x{rows}, {colours}, {environ.get('TERM', '')}")


def presets(gpus: list[Gpu], weights: Path | None, environ: Mapping[str, str]) -> Iterator[Check]:
    """For each preset: are its weights here, does it fit, will it run."""
    from wanrt.script import load_preset, preset_names

    for name in preset_names():
        preset = load_preset(name)
        verdict, text = judge_preset(preset, gpus, missing_parts(preset, weights, environ))
        yield Check("presets", name, verdict, text)


def missing_parts(preset: Preset, weights: Path | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The parts of a preset's weights that are not on this machine."""
    from wanrt.weights.registry import find_parts, search_directories, wanted_parts

    found = find_parts(preset, search_directories(weights, environ))
    return tuple(part for part in wanted_parts(preset) if part not in found)


def judge_preset(preset: Preset, gpus: list[Gpu], missing: tuple[str, ...]) -> tuple[Verdict, str]:
    """Whether `preset` will run on `gpus` or on the CPU, and what to do when not."""
    problems = []
    if missing and preset.weights.embedded:
        problems.append("its weights are not in this installation: reinstall wanrt")
    elif missing:
        problems.append(f"no {', '.join(missing).replace('_', ' ')}: wanrt weights pull {preset.name}")
    place, obstacle = _place(preset, gpus)
    if obstacle:
        problems.append(obstacle)
    if problems:
        return Verdict.NOTE, "will not run: " + "; ".join(problems)
    return Verdict.GOOD, f"will run {place}"


def _place(preset: Preset, gpus: list[Gpu]) -> tuple[str, str]:
    """Where `preset` runs at its first size, or what is in the way, by the estimate of `wanrt plan`."""
    from wanrt.parallel.choose import Machine, automatic
    from wanrt.parallel.topology import Topology
    from wanrt.parallel.workload import RUNTIME, Workload, memory
    from wanrt.script import build_job, read_script

    job = build_job(read_script("any prompt"), {"preset": preset.name})
    work = Workload.of(job)
    alone = memory(work, Topology())[0].total
    if not gpus:
        needs = alone - RUNTIME  # a CPU has no CUDA context
        fits = needs < PATIENCE
        return (
            f"on the CPU, about {needs / GIB:.1f} GiB",
            "" if fits else f"needs a GPU with {alone / GIB:.0f} GiB",
        )
    machine = Machine(len(gpus), gpus[0].name, min(gpu.memory for gpu in gpus))
    try:
        best = automatic(work, machine, job.anchor).topology
    except UsageError as short:
        return "", str(short)
    each = max(device.total for device in memory(work, best))
    return f"with --topology {best}, about {each / GIB:.1f} GiB a device", ""


def healthy(checks: list[Check]) -> bool:
    """Whether a video can be made at all: nothing bad, and at least one preset that runs."""
    runs = [check for check in checks if check.section == "presets" and check.verdict is Verdict.GOOD]
    return bool(runs) and all(check.verdict is not Verdict.BAD for check in checks)


def report(checks: list[Check]) -> str:
    """The checks as plain text, a section at a time."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ([""] if lines else []) + [section]
        lines.append(f"  {check.verdict:<4} {check.name:<{width}}  {check.text}")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks for a program."""
    return [vars(check) | {"verdict": str(check.verdict)} for check in checks]
