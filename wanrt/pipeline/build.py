"""From a `RenderJob` to a `Pipeline`: files found, models loaded, parts joined. One device; ranks come later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wanrt.errors import UsageError
from wanrt.pipeline.context import CHUNK_LATENTS, AnchorPolicy
from wanrt.pipeline.lanes import lanes_for
from wanrt.pipeline.loop import LoopSettings, Pipeline, to_rgb8
from wanrt.pipeline.mesh import Denoiser, InProcessMesh, Mesh, MeshSettings
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
    """What joins a pipeline to its surroundings.

    `check` raises to end the run; `progress` hears of loading; `convert` turns pixels `[1, 3, T, H, W]` in -1..1
    into what the frames' consumer wants, in the lane of display work.
    """

    recorder: Recorder
    check: Callable[[], None] = lambda: None
    progress: Progress = lambda part, seconds: None
    convert: Callable[[torch.Tensor], Any] = to_rgb8


@dataclass(frozen=True)
class Tuning:
    """How the device is driven; none of it changes what is computed. Both act on CUDA only."""

    graphs: bool = True  # steady passes and VAE calls as CUDA graphs
    compile: bool = (
        False  # torch.compile of each transformer layer: faster, but tens of seconds to begin with
    )


def find_files(job: RenderJob) -> ModelFiles | None:
    """The checkpoint files of a job, without reading them; None with random weights.

    Raises `WeightsError` when one is missing.
    """
    if job.random_weights:
        return None
    from wanrt.weights.registry import resolve

    return resolve(job.preset, job.weights)


def check_topology(job: RenderJob) -> None:
    """Raises `UsageError` for a topology of more than one device."""
    if job.topology not in ("single", "auto"):
        raise UsageError(f"topology {job.topology}: this pipeline runs on one device; use --topology single")


def build_pipeline(
    job: RenderJob,
    files: ModelFiles | None,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning | None = None,
) -> Pipeline:
    """Loads the models of `job` and joins them. `files` as `find_files` gave them.

    Raises `WeightsError` for foreign or damaged checkpoints, `UsageError` for a topology of more than one device.
    """
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import load_models

    models = load_models(job, files, device, choose_precision(job.precision, device), wiring.progress)
    wiring.check()
    return join(job, models, device, wiring, tuning)


def join(
    job: RenderJob, models: Models, device: torch.device, wiring: Wiring, tuning: Tuning | None = None
) -> Pipeline:
    """A pipeline of loaded models on one device."""
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import streaming_vae

    tuning, loop, lanes = tuning or Tuning(), loop_settings(job), lanes_for(device)
    with lanes.main():
        denoiser = _denoiser(job, models, device, tuning, wiring)
        vae = streaming_vae(models, job, choose_precision(job.precision, device), graphs=tuning.graphs)
    mesh = Mesh(denoiser, mesh_settings(job), wiring.recorder, wiring.check)
    window = loop.window if loop.anchors else None
    pixels = PixelStage(vae, window, wiring.recorder, wiring.check, loop.chunks, lanes)
    prompts = PromptBook(job.timeline, models.encode, wiring.recorder)
    handle = InProcessMesh(mesh, launch_on_submit=device.type == "cuda")
    return Pipeline(job.timeline, prompts, pixels, handle, loop, wiring.recorder, wiring.convert, lanes)


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


def _denoiser(
    job: RenderJob, models: Models, device: torch.device, tuning: Tuning, wiring: Wiring
) -> Denoiser:
    from wanrt.pipeline.denoiser import TransformerDenoiser
    from wanrt.pipeline.models import compile_blocks

    log.info(models.transformer.paths())
    cache = allocate_cache(job, device, models.transformer.dtype)
    if device.type != "cuda":
        return TransformerDenoiser(models.transformer, cache, device)
    if tuning.compile:
        compile_blocks(models.transformer)
    if not tuning.graphs:
        return TransformerDenoiser(models.transformer, cache, device)
    return _graphed(job, models, cache, device, wiring)


def _graphed(
    job: RenderJob, models: Models, cache: KVCache, device: torch.device, wiring: Wiring
) -> Denoiser:
    from wanrt.pipeline.graphs import GraphedDenoiser

    denoiser = GraphedDenoiser(models.transformer, cache, device)
    began = time.perf_counter()

    def step(done: int, of: int) -> None:
        wiring.check()
        wiring.progress("warm-up", None)

    denoiser.capture(mesh_settings(job).shape, biases_on(job), step)
    wiring.progress("warm-up", time.perf_counter() - began)
    return denoiser


def biases_on(job: RenderJob) -> frozenset[bool]:
    """Whether the scenes of a job use the attention bias: never, always, or both."""
    scenes = job.timeline.scenes
    return frozenset((job.bias if scene.bias is None else scene.bias) != 1.0 for scene in scenes)


def make_recorder(job: RenderJob, device: torch.device, started_ns: int | None) -> Recorder:
    """A recorder on the device's own clock. `started_ns`: what time to first frame counts from."""
    return Recorder(fps=job.fps, device_clock=clock_for(device), started_ns=started_ns)
