"""From a `RenderJob` to a `Pipeline`: files found, models loaded, parts joined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wanrt.errors import UsageError
from wanrt.pipeline.codec import Codec, LocalCodec, StreamingVae
from wanrt.pipeline.conditioning import Curve, mix
from wanrt.pipeline.context import CHUNK_LATENTS, AnchorPolicy
from wanrt.pipeline.envelope import all_finite
from wanrt.pipeline.lanes import Flag, Lanes, lanes_for
from wanrt.pipeline.loop import LoopSettings, Pipeline, to_rgb8
from wanrt.pipeline.mesh import Denoiser, InProcessMesh, Mesh, MeshSettings
from wanrt.pipeline.pixels import PixelStage
from wanrt.pipeline.progress import Progress, timed, unheard
from wanrt.pipeline.prompts import KEPT, PromptBook
from wanrt.telemetry import Recorder, clock_for

if TYPE_CHECKING:
    import torch

    from wanrt.models.kv_cache import KVCache
    from wanrt.models.transformer import WanTransformer
    from wanrt.parallel.crew import Crew
    from wanrt.parallel.reserve import Reserve
    from wanrt.parallel.topology import Topology
    from wanrt.parallel.workload import Workload
    from wanrt.pipeline.envelope import MeshHandle
    from wanrt.pipeline.models import Stage0Models
    from wanrt.pipeline.shelf import Shelf
    from wanrt.script import RenderJob
    from wanrt.weights.registry import ModelFiles

log = logging.getLogger("wanrt.pipeline")


@dataclass(frozen=True)
class Wiring:
    """What joins a pipeline to its surroundings.

    `check` raises to end the run; `progress` hears of loading; `convert` turns pixels `[1, 3, T, H, W]` in -1..1
    into what the frames' consumer wants, in the lane of display work. `crew`: ranks that torchrun started; None: this
    process starts its own, as far as they are not in `reserve` already. `shelf`: models that an
    earlier run of this process may have left; used with one device.
    """

    recorder: Recorder
    check: Callable[[], None] = lambda: None
    progress: Progress = unheard
    convert: Callable[[torch.Tensor], Any] = to_rgb8
    crew: Crew | None = None
    reserve: Reserve | None = None
    shelf: Shelf | None = None

    def loading(self, part: str, seconds: float | None, fraction: float | None = None) -> None:
        """The `Progress` to load by: `progress` hears it, and `check` may break off what can take a minute."""
        self.progress(part, seconds, fraction)
        self.check()


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


def settle_topology(job: RenderJob, device: torch.device, world: int | None = None) -> RenderJob:
    """The job with `auto` replaced by what it stands for here, after all that can be refused was refused.

    On CUDA devices and their memory are counted; a CPU takes any number of ranks as far as its memory goes, and
    `auto` is one. world: ranks that torchrun started, which the topology must use up. Raises
    `UsageError` with the failed equation, or the memory that is missing, and what would work; and for a precision
    or an attention backend that the device does not have.
    """
    import psutil

    from wanrt.parallel.choose import Machine, check_memory, check_world, resolve
    from wanrt.parallel.report import find_machine
    from wanrt.parallel.workload import Workload
    from wanrt.pipeline.devices import choose_attention, choose_precision

    precision = choose_precision(job.precision, device)
    choose_attention(job.attention, device, precision, job.preset.transformer_config().head_dim)
    cpu = Machine(world or 1, "CPU", psutil.virtual_memory().total)
    if device.type == "cuda" or (job.topology == "auto" and world is not None):
        machine = cpu if device.type == "cpu" else find_machine(world, None, None, None)
        choice = resolve(job.topology, Workload.of(job), machine, job.anchor, world=world)
        log.info("topology %s: %s", choice.topology, choice.reason)
        job = replace(job, topology=str(choice.topology))
    elif job.topology == "auto":
        log.info("topology single: auto on a CPU")
        job = replace(job, topology="single")
    topology = topology_of(job)
    check_world(topology, Workload.of(job), world)
    if device.type == "cpu":
        check_memory(topology, _on_cpu(job), cpu)
    return job


def _on_cpu(job: RenderJob) -> Workload:
    """What a job asks of a CPU: `auto` precision is fp32 there, and random weights come without a text encoder."""
    from wanrt.parallel.workload import Workload

    work = Workload.of(job)
    return replace(
        work,
        element=4 if job.precision in ("auto", "fp32") else 2,
        text_encoder=0 if job.random_weights else work.text_encoder,
    )


def topology_of(job: RenderJob) -> Topology:
    """The topology of a settled job.

    Raises `UsageError` for one that the model cannot take or that is not there yet.
    """
    from wanrt.parallel.topology import ModelShape, Topology, check

    topology = Topology.parse(job.topology)
    shape = job.preset.transformer
    tokens = job.grid[0] * job.grid[1]
    check(topology, ModelShape(shape.num_heads, shape.ffn_dim, tokens, max(job.latent_size)))
    if topology.vae > 1 and job.preset.vae.kind != "wan":
        raise UsageError(
            f"topology {topology}: the {job.preset.vae.kind} VAE is not split; leave out +vae={topology.vae}"
        )
    return topology


def join(
    job: RenderJob,
    models: Stage0Models,
    transformer: WanTransformer,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning | None = None,
) -> Pipeline:
    """A pipeline of loaded models on one device."""
    tuning, lanes = tuning or Tuning(), lanes_for(device)
    with lanes.main():
        mesh = make_mesh(job, transformer, device, wiring, tuning)
    handle = InProcessMesh(mesh, launch_on_submit=device.type == "cuda")
    rehearse(job, models, device, wiring, lanes)
    return join_stage0(job, models, handle, device, wiring, tuning, lanes)


def join_stage0(
    job: RenderJob,
    models: Stage0Models,
    handle: MeshHandle,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning,
    lanes: Lanes,
    codec: Codec | None = None,
) -> Pipeline:
    """Stage 0 on `device`, its mesh wherever `handle` says; `codec`: its VAE where that is split over ranks."""
    loop = loop_settings(job)
    if codec is None:
        codec = local_codec(job, models.vae, device, wiring, tuning, lanes)
    window = loop.window if loop.anchors else None
    pixels = PixelStage(codec, window, wiring.recorder, wiring.check, loop.chunks, lanes)
    prompts = PromptBook(job.timeline, models.encode, wiring.recorder)
    return Pipeline(job.timeline, prompts, pixels, handle, loop, wiring.recorder, wiring.convert, lanes)


def local_codec(
    job: RenderJob, vae: StreamingVae, device: torch.device, wiring: Wiring, tuning: Tuning, lanes: Lanes
) -> LocalCodec:
    """The VAE of one stream on this device alone; on CUDA its calls are captured here."""
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.models import streaming_vae

    precision = choose_precision(job.precision, device)
    with lanes.main():
        own = streaming_vae(vae, job, precision, graphs=tuning.graphs, progress=wiring.loading)
    return LocalCodec(own, lanes)


def rehearse(
    job: RenderJob, models: Stage0Models, device: torch.device, wiring: Wiring, lanes: Lanes
) -> None:
    """Does once on CUDA, before the stream, what stage 0 does in it: kernels are compiled and loaded, memory pinned.

    At their first use that held the first frames up for half a second, and the first blend of two prompts a chunk for
    0.1 s (H100, PyTorch 2.11).
    """
    if device.type != "cuda":
        return
    import torch

    from wanrt.script import chunk_frames

    with torch.inference_mode():
        with lanes.ahead():
            embedding = models.encode("")
            mix(embedding, embedding, 0.5, Curve.SLERP)  # which goes the straight way too
            # of all prompts that are kept: asked for in a stream, memory may make the device wait
            room = [torch.empty_like(embedding) for _ in range(KEPT)]
            del room
        with lanes.side():
            for chunk in range(2):
                pixels = torch.zeros(1, 3, chunk_frames(chunk), job.height, job.width, device=device)
                wiring.convert(pixels)
                Flag(all_finite(pixels))


@dataclass(frozen=True)
class CacheShare:
    """A rank's part of a stream's KV cache.

    Attributes:
        heads: of a sharded transformer, how many this rank attends with; None: all.
        empty: makes its buffers where other ranks store in them, see `KVCache.allocate`.
    """

    heads: int | None = None
    empty: Callable[[Sequence[int], torch.dtype], torch.Tensor] | None = None


WHOLE_CACHE = CacheShare()


def make_mesh(
    job: RenderJob,
    transformer: WanTransformer,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning,
    share: CacheShare = WHOLE_CACHE,
) -> Mesh:
    """The mesh's part of one process."""
    denoiser = make_denoiser(job, transformer, device, wiring, tuning, share)
    return Mesh(denoiser, mesh_settings(job), wiring.recorder, wiring.check)


def make_denoiser(
    job: RenderJob,
    transformer: WanTransformer,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning,
    share: CacheShare = WHOLE_CACHE,
) -> Denoiser:
    """A transformer with a cache of its own, eager or as graphs."""
    cache = allocate_cache(job, device, transformer.dtype, share)
    return _denoiser(job, transformer, cache, device, wiring, tuning)


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


def allocate_cache(
    job: RenderJob, device: torch.device, dtype: torch.dtype, share: CacheShare = WHOLE_CACHE
) -> KVCache:
    """The KV cache of one stream, with the preset's policy and the job's window."""
    from wanrt.models.kv_cache import CachePolicy, KVCache

    return KVCache.allocate(
        job.preset.transformer_config(),
        policy=CachePolicy(job.preset.cache.policy),
        frames=job.window,
        grid=job.grid,
        chunk=CHUNK_LATENTS,
        sink=job.preset.cache.sink,
        heads=share.heads,
        device=device,
        dtype=dtype,
        empty=share.empty,
    )


def _denoiser(
    job: RenderJob,
    transformer: WanTransformer,
    cache: KVCache,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning,
) -> Denoiser:
    from wanrt.pipeline.denoiser import TransformerDenoiser
    from wanrt.pipeline.models import compile_blocks

    model = getattr(transformer, "model", transformer)  # Ulysses wraps it
    log.info(model.paths())
    if device.type != "cuda":
        return TransformerDenoiser(transformer, cache, device)
    if tuning.compile:
        compile_blocks(model)
    if not tuning.graphs:
        return TransformerDenoiser(transformer, cache, device)
    return _graphed(job, transformer, cache, device, wiring)


def _graphed(
    job: RenderJob, transformer: WanTransformer, cache: KVCache, device: torch.device, wiring: Wiring
) -> Denoiser:
    from wanrt.pipeline.graphs import GraphedDenoiser

    denoiser = GraphedDenoiser(transformer, cache, device)
    # not `loading`: what raised after the last capture would leave graphs behind that nobody closes
    with timed(wiring.progress, "warm-up") as done:

        def step(captured: int, of: int) -> None:
            wiring.check()
            done(captured, of)

        denoiser.capture(mesh_settings(job).shape, biases_on(job), step)
    return denoiser


def biases_on(job: RenderJob) -> frozenset[bool]:
    """Whether the scenes of a job use the attention bias: never, always, or both. Live ones may turn to either."""
    from wanrt.pipeline.live import LiveTimeline

    if isinstance(job.timeline, LiveTimeline):
        return frozenset({True, False})
    scenes = job.timeline.scenes
    return frozenset((job.bias if scene.bias is None else scene.bias) != 1.0 for scene in scenes)


def make_recorder(
    job: RenderJob, device: torch.device, started_ns: int | None, rank: str = "main"
) -> Recorder:
    """A recorder on the device's own clock. `started_ns`: what time to first frame counts from."""
    return Recorder(fps=job.fps, device_clock=clock_for(device), started_ns=started_ns, rank=rank)
