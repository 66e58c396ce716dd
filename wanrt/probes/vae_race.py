"""`wanrt bench --vae`: the VAE's streaming calls as wanrt runs them here, beside what else decodes Wan's latents.

Everything is measured in one process on one device with the same random weights, so that a ratio compares like with
like. `wanrt.probes.vae_entrants` says who takes part and what the calls are. cuDNN times its algorithms for all of
them: for wanrt while it captures, as in a run; for the others, none of which asks for it, during the warm-up.

    ms       median, and 95th percentile, of one call alone on an idle device; a whole clip's is divided by its latents
    x wanrt  the median over wanrt's of the same call
    error    |p - p'| / |p'| of the pixels of the first latents, p' decoded by diffusers in fp32 from the same weights
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanrt.errors import UsageError
from wanrt.pipeline.bench import job_of
from wanrt.pipeline.bench_report import Timing, Unmeasured
from wanrt.pipeline.matrix import Entry
from wanrt.probes.vae_race_report import OURS, Race, RaceRun

if TYPE_CHECKING:
    import torch

    from wanrt.pipeline.devices import Precision
    from wanrt.probes.vae_entrants import Course
    from wanrt.probes.vae_stopwatch import Repetitions
    from wanrt.script import RenderJob

log = logging.getLogger("wanrt.probes")

FULL_SIZE = "krea-14b"  # a preset with the VAE of Wan 2.1 at its full width
FULL_WIDTH = 96  # its base_dim
CLIP_LATENTS = 21  # 81 frames: a clip of Wan 2.1 itself (wan/configs at 9737cba, frame_num)
SHOWN_LATENTS = 3  # 9 frames: the first latent, and two that look back


def race(
    jobs: Iterable[RenderJob],
    *,
    calls: int = 8,
    warm_up: int = 3,
    graphs: bool = True,
    clip: int = CLIP_LATENTS,
    keep: Callable[[Race], object] = lambda race: None,
) -> Race:
    """Measures every implementation at the size of every job; `keep` gets what is known after each of them.

    calls: repetitions, on CUDA ten at least. clip: latents of a whole clip. graphs: see `streaming_vae`.
    Raises `UsageError` for too few repetitions or latents, a preset whose VAE is not Wan's, and a device or precision
    that is not here; `RunError` where wanrt's own VAE fails.
    """
    from wanrt.pipeline.devices import choose_device, choose_precision, set_threads, wait_passively

    wanted = list(jobs)
    for job in wanted:
        _check(job, calls, warm_up, clip)
    wait_passively()
    device = choose_device(wanted[0].device)
    set_threads(device)
    precision = choose_precision(wanted[0].precision, device)
    from wanrt.pipeline.run import one_line_errors
    from wanrt.probes.vae_entrants import OPENERS, Course
    from wanrt.probes.vae_stopwatch import Repetitions, on_device

    if device.type == "cpu" and wanted[0].preset.vae.base_dim >= FULL_WIDTH:
        log.warning(
            "the full-size VAE on a CPU: a whole clip takes minutes to hours; see --preset, --size, --chunks"
        )

    repetitions = Repetitions.of(calls, warm_up, device)
    found = Race(_settings(wanted[0], device, precision, graphs, clip, repetitions))
    with on_device(device), one_line_errors():
        for job in wanted:
            course = Course.of(job, device, precision, graphs=graphs, clip=clip)
            reference = _reference(course)
            for name in OPENERS:
                found = replace(found, runs=(*found.runs, _run(name, course, repetitions, reference)))
                keep(found)
    return found


def _check(job: RenderJob, calls: int, warm_up: int, clip: int) -> None:
    from wanrt.pipeline.context import CHUNK_LATENTS

    if calls < 2 or warm_up < 1:
        raise UsageError(f"bench of {calls} calls after {warm_up}: expected at least 2 after at least 1")
    if clip <= CHUNK_LATENTS:
        raise UsageError(
            f"clip of {clip} latents: expected at least {CHUNK_LATENTS + 1}, a first one and a chunk"
        )
    if job.preset.vae.kind != "wan":
        raise UsageError(
            f"--vae with preset {job.preset.name}: its VAE is {job.preset.vae.kind}, expected Wan's; "
            "choose another --preset"
        )


def _settings(
    job: RenderJob,
    device: torch.device,
    precision: Precision,
    graphs: bool,
    clip: int,
    repetitions: Repetitions,
) -> dict[str, object]:
    config = job.preset.vae_config()
    sizes = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temporal_downsample")
    return {
        "preset": job.preset.name,
        "vae": {name: getattr(config, name) for name in sizes},
        "device": str(device),
        "precision": str(precision.vae).removeprefix("torch."),
        "graphs": graphs and device.type == "cuda",
        "clip_latents": clip,
        "repetitions": asdict(repetitions),
    }


def _reference(course: Course) -> torch.Tensor | None:
    """What pixels are compared with; None, with a line in the log, where it cannot be had."""
    from wanrt.probes.vae_entrants import UnavailableError, reference_pixels

    try:
        return reference_pixels(course, course.latents[:, :, :SHOWN_LATENTS])
    except UnavailableError as missing:
        log.warning("pixels are compared with nothing: diffusers: %s", missing)
    except Exception as error:  # theirs, whatever it is
        log.warning("pixels are compared with nothing: diffusers in fp32: %s", _words(error))
    return None


def _run(
    name: str, course: Course, repetitions: Repetitions, reference: torch.Tensor | None
) -> RaceRun | Unmeasured:
    from wanrt.probes.vae_entrants import UnavailableError

    size = f"{course.job.width}x{course.job.height}"
    log.info("%s at %s", name, size)
    try:
        return _measure(name, size, course, repetitions, reference)
    except UnavailableError as missing:
        return Unmeasured(f"{name} {size}", str(missing))
    except Exception as error:  # an independent implementation's failure is a finding, not the end
        if name == OURS:
            raise
        log.warning("%s at %s: %s", name, size, _words(error))
        log.debug("%s at %s failed", name, size, exc_info=error)
        return Unmeasured(f"{name} {size}", _words(error))


def _measure(
    name: str, size: str, course: Course, repetitions: Repetitions, reference: torch.Tensor | None
) -> RaceRun:
    from wanrt.probes.vae_entrants import OPENERS
    from wanrt.probes.vae_stopwatch import relative_error, time_entrant

    lap = time_entrant(OPENERS[name], course, repetitions, tuned=name != OURS, shown=SHOWN_LATENTS)
    return RaceRun(
        size=size,
        implementation=name,
        dtype=lap.dtype,
        calls={call: Timing.of(times) for call, times in lap.calls.items()},
        build_s=lap.build_s,
        warm_up_s=lap.warm_up_s,
        state_mib=lap.state_mib,
        peak_mib=lap.peak_mib,
        clip_peak_mib=lap.clip_peak_mib,
        error_against_diffusers=None if reference is None else relative_error(lap.pixels, reference),
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run_race(
    flags: Mapping[str, Any], calls: int, warm_up: int, json: str | None, *, graphs: bool = True
) -> str:
    """What the command does: races, writes the JSON after each implementation, returns the table.

    flags: preset (default: one with the full-size VAE), size (default: all of the preset's), precision, device.
    Raises `UsageError` under torchrun, whose ranks would measure each other, and as `race`.
    """
    from wanrt.parallel.launch import Launch
    from wanrt.telemetry.files import check_measurement, write_json

    if Launch.find(os.environ) is not None:
        raise UsageError(
            "--vae under torchrun: expected one process on one device; run wanrt bench --vae itself"
        )
    if json is not None:
        check_measurement(Path(json))

    def keep(found: Race) -> None:
        if json is not None:
            write_json(json, found.document())

    found = race(_jobs(flags), calls=calls, warm_up=warm_up, graphs=graphs, clip=CLIP_LATENTS, keep=keep)
    return found.table()


def _jobs(flags: Mapping[str, Any]) -> list[RenderJob]:
    """One job a size, the smallest first."""
    common = {**flags, "preset": flags.get("preset") or FULL_SIZE, "random_weights": True}
    first = job_of(common, Entry())
    if flags.get("size") is not None:
        return [first]
    sizes = sorted(first.preset.video.sizes, key=lambda size: size[0] * size[1])
    return [replace(first, width=width, height=height) for width, height in sizes]
