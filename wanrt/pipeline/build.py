"""From a `RenderJob` to a `Pipeline`: files found, models loaded, parts joined. One device; ranks come later."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.pipeline.context import CHUNK_LATENTS, AnchorPolicy
from wanrt.pipeline.loop import LoopSettings, Pipeline
from wanrt.pipeline.mesh import InProcessMesh, Mesh, MeshSettings
from wanrt.pipeline.pixels import PixelStage
from wanrt.pipeline.prompts import PromptBook
from wanrt.telemetry import Recorder, clock_for

if TYPE_CHECKING:
    import torch

    from wanrt.models.kv_cache import KVCache
    from wanrt.pipeline.models import Models, Progress
    from wanrt.script import RenderJob
    from wanrt.weights.registry import ModelFiles

log = logging.getLogger("wanrt.pipeline")


@dataclass(frozen=True)
class Wiring:
    """What joins a pipeline to its surroundings. `check` raises to end the run; `progress` hears of loading."""

    recorder: Recorder
    check: Callable[[], None] = lambda: None
    progress: Progress = lambda part, seconds: None


def find_files(job: RenderJob) -> ModelFiles | None:
    """The checkpoint files of a job, without reading them; None with random weights.

    Raises `WeightsError` when one is missing.
    """
    if job.random_weights:
        return None
    from wanrt.weights.registry import resolve

    return resolve(job.preset, job.weights)


def build_pipeline(
    job: RenderJob, files: ModelFiles | None, device: torch.device, wiring: Wiring
) -> Pipeline:
    """Loads the models of `job` and joins them. `files` as `find_files` gave them.

    Raises `WeightsError` for foreign or damaged checkpoints, `UsageError` for a topology of more than one device.
    """
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import load_models

    if job.topology not in ("single", "auto"):
        raise UsageError(f"topology {job.topology}: this pipeline runs on one device; use --topology single")
    precision = choose_precision(job.precision, device)
    models = load_models(job, files, device, precision, wiring.progress)
    wiring.check()
    return join(job, models, device, wiring)


def join(job: RenderJob, models: Models, device: torch.device, wiring: Wiring) -> Pipeline:
    """A pipeline of loaded models on one device."""
    loop = loop_settings(job)
    mesh = Mesh(_denoiser(job, models, device), mesh_settings(job), wiring.recorder, wiring.check)
    window = loop.window if loop.anchors else None
    pixels = PixelStage(models.vae, window, wiring.recorder, wiring.check, loop.chunks)
    prompts = PromptBook(job.timeline, models.encode, wiring.recorder)
    handle = InProcessMesh(mesh, launch_on_submit=device.type == "cuda")
    return Pipeline(job.timeline, prompts, pixels, handle, loop, wiring.recorder)


def loop_settings(job: RenderJob) -> LoopSettings:
    """What stage 0 decides by."""
    recompute = job.preset.cache.policy == "recompute"
    return LoopSettings(AnchorPolicy(job.anchor), job.window, recompute, job.frames, job.steps, job.bias)


def mesh_settings(job: RenderJob) -> MeshSettings:
    """What every rank of a mesh agrees on."""
    shape = (1, job.preset.vae.z_dim, CHUNK_LATENTS, *job.latent_size)
    recompute = job.preset.cache.policy == "recompute"
    return MeshSettings(
        job.seed, job.preset.sampling.shift, job.window, AnchorPolicy(job.anchor), recompute, shape
    )


def allocate_cache(job: RenderJob, device: torch.device, dtype: torch.dtype) -> KVCache:
    """The KV cache of one stream, with the preset's policy and the job's window."""
    from wanrt.models.kv_cache import CachePolicy, KVCache

    return KVCache.allocate(
        job.preset.transformer_config(),
        policy=CachePolicy(job.preset.cache.policy),
        frames=job.window,
        grid=job.grid,
        chunk=CHUNK_LATENTS,
        sink=job.preset.cache.sink,
        device=device,
        dtype=dtype,
    )


def _denoiser(job: RenderJob, models: Models, device: torch.device):  # type: ignore[no-untyped-def]
    from wanrt.pipeline.denoiser import TransformerDenoiser

    cache = allocate_cache(job, device, models.transformer.dtype)
    return TransformerDenoiser(models.transformer, cache, device)


def make_recorder(job: RenderJob, device: torch.device, started_ns: int | None) -> Recorder:
    """A recorder on the device's own clock. `started_ns`: what time to first frame counts from."""
    return Recorder(fps=job.fps, device_clock=clock_for(device), started_ns=started_ns)
