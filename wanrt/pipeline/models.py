"""The models of a job, loaded once: from the wheel, from a weights directory, or drawn at random."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from wanrt.errors import UsageError
from wanrt.parallel.workload import PROMPT_TOKENS
from wanrt.pipeline.codec import StreamingVae
from wanrt.pipeline.devices import Precision
from wanrt.pipeline.progress import Done, Progress, timed, unheard

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from wanrt.models.text_encoder import UMT5Encoder
    from wanrt.models.tokenizer import PromptTokenizer
    from wanrt.models.transformer import WanTransformer
    from wanrt.models.vae import WanVae
    from wanrt.models.vae_fast import FastVae
    from wanrt.models.vae_graph import GraphedVae
    from wanrt.parallel.peers import Peers
    from wanrt.parallel.plan import ShardPlan
    from wanrt.parallel.vae_split import SplitVae
    from wanrt.script import Preset, RenderJob
    from wanrt.weights.registry import ModelFiles

log = logging.getLogger("wanrt.pipeline")


@dataclass(frozen=True)
class Stage0Models:
    """What stage 0 needs. `encode` turns one prompt into `[1, L, text_dim]`."""

    vae: StreamingVae
    encode: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Shard:
    """This process's share of the transformer: the plan, the mesh's process group, and its shared memory, if any."""

    plan: ShardPlan
    group: ProcessGroup
    peers: Peers | None = None


def load_stage0(
    job: RenderJob, files: ModelFiles | None, device: torch.device, precision: Precision, progress: Progress
) -> Stage0Models:
    """Loads text encoder and VAE; `files` None draws random weights, and hashes prompts: with random weights an
    embedding of the prompt's hash says as much as a text encoder, and costs nothing.

    Raises `WeightsError` for a checkpoint that is missing, damaged, or not the preset's.
    """
    if files is None:
        log.warning(
            "random weights: the picture means nothing; prompts are hashed, the text encoder is not loaded"
        )
        vae = load_streaming_vae(job, files, device, precision, progress)
        t = job.preset.transformer
        return Stage0Models(vae, partial(hashed_embedding, t.text_len, t.text_dim, device))
    with timed(progress, "text encoder") as done:
        encode = _text_encoder(job.preset, files, device, precision, done)
    return Stage0Models(load_streaming_vae(job, files, device, precision, progress), encode)


def load_streaming_vae(
    job: RenderJob, files: ModelFiles | None, device: torch.device, precision: Precision, progress: Progress
) -> StreamingVae:
    """Loads the VAE; `files` None draws random weights, the same in every process. Raises as `load_stage0`."""
    with timed(progress, "VAE"):
        if files is None:
            return _random_vae(job, device, precision)
        return _vae(job.preset, files, device, precision)


def load_transformer(
    job: RenderJob,
    files: ModelFiles | None,
    device: torch.device,
    precision: Precision,
    progress: Progress,
    shard: Shard | None = None,
) -> WanTransformer:
    """Loads the transformer, or this rank's slices of it; `files` None draws random weights, the same whole.

    With `precision.fp8` its large products are quantised as they are read. Raises `WeightsError` as `load_stage0`,
    `UsageError` for sizes that fp8 products cannot take, and for an attention backend that cannot run here.
    """
    from wanrt.models.transformer import WanTransformer
    from wanrt.parallel.apply import apply
    from wanrt.parallel.topology import MeshKind
    from wanrt.pipeline.devices import choose_attention
    from wanrt.weights.checkpoint import identify
    from wanrt.weights.loading import build_on_meta, fill, open_transformer
    from wanrt.weights.random import RandomSource

    config = job.preset.transformer_config()
    attention = choose_attention(job.attention, device, precision, config.head_dim)
    with timed(progress, "transformer") as done:
        model = callee = build_on_meta(lambda: WanTransformer(config, attention=attention))
        if files is None:
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            checkpoint = identify(RandomSource(shapes, job.seed, device, precision.transformer))
        else:
            checkpoint = open_transformer(files.transformer, files.lora)
        slicer = None
        if shard is not None:
            with torch_device("meta"):
                callee = apply(model, shard.plan, shard.group, shard.peers)  # type: ignore[assignment]
            if shard.plan.kind is MeshKind.TP:  # else the weights are whole, and best mapped
                slicer = shard.plan.slicer(shard.group.rank())
        if precision.fp8:
            put_in_fp8(model)
        fill(model, checkpoint, device, precision.transformer, slicer=slicer, done=done)
        if device.type == "cuda":
            join_products(model)
    return callee


def join_products(model: WanTransformer) -> None:
    """Fewer and larger products, where the weights lie on a GPU."""
    from wanrt.models.products import add_onto_residuals, fuse_gelu, join_projections

    log.info(
        "transformer: q, k and v as one product in %d layers, GELU inside the product in %d, residual in %d",
        join_projections(model),
        fuse_gelu(model),
        add_onto_residuals(model),
    )


def put_in_fp8(model: WanTransformer) -> None:
    """Gives a transformer on meta its fp8 products. Raises `UsageError` for sizes that they cannot take."""
    from wanrt.models.fp8 import apply_fp8, plan_for

    try:
        count = apply_fp8(model, plan_for(model.config.num_layers))
    except ValueError as error:
        raise UsageError(f"precision fp8: {error}; take --precision bf16, or another topology") from error
    log.info(
        "transformer: %d products in fp8 (e4m3fn, a scale a token and a channel), the rest in bf16", count
    )


def torch_device(name: str) -> AbstractContextManager[object]:
    """Inside the block new tensors are made there."""
    import torch

    return torch.device(name)


def _random_vae(job: RenderJob, device: torch.device, precision: Precision) -> StreamingVae:
    from wanrt.models.vae import WanVae
    from wanrt.weights.loading import build_on_meta
    from wanrt.weights.random import random_weights

    empty = build_on_meta(lambda: WanVae(job.preset.vae_config()))
    return random_weights(empty, job.seed, device, precision.vae)


def _text_encoder(
    preset: Preset, files: ModelFiles, device: torch.device, precision: Precision, done: Done
) -> Callable[[str], torch.Tensor]:
    from wanrt.weights.loading import load_text_encoder, load_tokenizer

    tokenizer = load_tokenizer(files.tokenizer, preset.transformer.text_len, preset.text.vocab)
    config = preset.text_config()
    encoder = load_text_encoder(files.text_encoder, config, device, precision.text, done=done)
    return partial(_encode, encoder, tokenizer)


def _encode(encoder: UMT5Encoder, tokenizer: PromptTokenizer, prompt: str) -> torch.Tensor:
    from wanrt.models.text_encoder import encode_prompts

    if unknown := tokenizer.unknown_words(prompt):
        words = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        log.warning("the model does not know: %s (in %.60s)", words, prompt)
    return encode_prompts(encoder, tokenizer, [prompt])


def _vae(preset: Preset, files: ModelFiles, device: torch.device, precision: Precision) -> StreamingVae:
    from wanrt.weights.loading import load_vae

    config = preset.vae_config() if preset.vae.kind == "wan" else None
    vae = load_vae(files.vae, config, device, precision.vae)
    assert hasattr(vae, "encode_frame"), "load_vae gives streaming VAEs only"
    return vae  # type: ignore[return-value]


def hashed_embedding(text_len: int, dim: int, device: torch.device, prompt: str) -> torch.Tensor:
    """A random embedding of its own for each prompt, the same on every machine.

    `[1, L, dim]`, L being `PROMPT_TOKENS`, or `text_len` where a model takes fewer.
    """
    import torch

    from wanrt.models.transfer import send
    from wanrt.pipeline.noise import standard_normal

    key = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=16).digest(), "little")
    tokens = min(PROMPT_TOKENS, text_len)
    values = standard_normal(key, tokens * dim).reshape(1, tokens, dim)
    return send(torch.from_numpy(values), device)


def streaming_vae(
    vae: StreamingVae, job: RenderJob, precision: Precision, *, graphs: bool, progress: Progress = unheard
) -> StreamingVae:
    """The VAE as a stream of this size runs it: on CUDA the repacked one, its calls as graphs; else as it is."""
    from wanrt.models.vae import WanVae

    if not isinstance(vae, WanVae):
        return vae
    return _graphed(_repacked(vae, precision), job.latent_size, graphs, progress)


def split_vae(
    vae: StreamingVae,
    job: RenderJob,
    precision: Precision,
    group: ProcessGroup,
    peers: Peers | None,
    *,
    graphs: bool,
    progress: Progress = unheard,
) -> SplitVae:
    """This rank's band of a VAE split over `group`, run as `streaming_vae` would; ranks must call it together.

    peers: the group's shared memory, through which bands then exchange lines; None: collectives exchange them.
    """
    from wanrt.models.vae import WanVae
    from wanrt.parallel.bands import Band, GroupNeighbours, Neighbours
    from wanrt.parallel.peer_bands import PeerNeighbours
    from wanrt.parallel.vae_split import SplitVae, split

    assert isinstance(vae, WanVae), "topology_of refuses to split another VAE"
    band = Band.of(*job.latent_size, group.size(), group.rank())
    neighbours: Neighbours = GroupNeighbours(group)
    if peers is not None:
        neighbours = PeerNeighbours(peers, next(vae.parameters()).device)
    fast = _repacked(vae, precision)
    split(fast, band, neighbours)
    log.info(
        "VAE part %d: %d of %d latent %s, border lines %s",
        band.index,
        band.lengths[band.index],
        band.bounds[-1],
        band.axis,
        "as messages" if peers is None else "stored by kernels in the neighbours' memory",
    )
    return SplitVae(_graphed(fast, band.size(*job.latent_size), graphs, progress), band, neighbours)


def _repacked(vae: WanVae, precision: Precision) -> WanVae | FastVae:
    """On CUDA the VAE rearranged for it, elsewhere the VAE as it is."""
    from wanrt.models.vae_fast import FastVae
    from wanrt.models.vae_graph import races

    if next(vae.parameters()).device.type != "cuda":
        return vae
    fast = FastVae(vae, dtype=precision.vae, encode_dtype=precision.vae)
    chosen = "by a race: two runs may differ in last bits" if races(fast) else "by rule"
    by = "wanrt's Hopper kernel" if fast.why_cudnn is None else f"cuDNN ({fast.why_cudnn})"
    log.info("VAE: convolutions in time by %s, cuDNN's algorithms %s", by, chosen)
    return fast


def _graphed(
    vae: WanVae | FastVae, latent_size: tuple[int, int], graphs: bool, progress: Progress
) -> WanVae | FastVae | GraphedVae:
    from wanrt.models.vae_fast import FastVae
    from wanrt.models.vae_graph import GraphedVae

    if not graphs or not isinstance(vae, FastVae):
        return vae
    height, width = latent_size
    with timed(progress, "VAE graphs"):
        return GraphedVae(vae, width=8 * width, height=8 * height)


def compile_blocks(transformer: WanTransformer, backend: str = "inductor") -> None:
    """Compiles each layer on its own: the layers share their graphs, so it takes seconds, not minutes."""
    import torch

    # Two graphs (the first layer has no residual to finish) for each context size, with and without bias; the
    # default of 8 ends in an error under fullgraph.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
