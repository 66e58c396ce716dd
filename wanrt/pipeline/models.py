"""The models of a job, loaded once: from the wheel, from a weights directory, or drawn at random."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from wanrt.pipeline.devices import Precision
from wanrt.pipeline.pixels import StreamingVae

if TYPE_CHECKING:
    import torch

    from wanrt.models.text_encoder import UMT5Encoder
    from wanrt.models.tokenizer import PromptTokenizer
    from wanrt.models.transformer import WanTransformer
    from wanrt.script import Preset, RenderJob
    from wanrt.weights.registry import ModelFiles

log = logging.getLogger("wanrt.pipeline")

Progress = Callable[[str, float | None], None]  # (part, seconds it took; None: it begins)

RANDOM_TOKENS = 24  # a prompt of average length, for random embeddings


@dataclass(frozen=True)
class Models:
    """Everything a pipeline needs of the model rooms. `encode` turns one prompt into `[1, L, text_dim]`."""

    transformer: WanTransformer
    vae: StreamingVae
    encode: Callable[[str], torch.Tensor]


def load_models(
    job: RenderJob, files: ModelFiles | None, device: torch.device, precision: Precision, progress: Progress
) -> Models:
    """Loads the models of `job` on `device`; `files` None draws random weights.

    Raises `WeightsError` for a checkpoint that is missing, damaged, or not the preset's.
    """
    if files is None:
        return _random_models(job, device, precision, progress)
    with _timed(progress, "text encoder"):
        encode = _text_encoder(job.preset, files, device, precision)
    with _timed(progress, "VAE"):
        vae = _vae(job.preset, files, device, precision)
    with _timed(progress, "transformer"):
        from wanrt.weights.loading import load_transformer

        config = job.preset.transformer_config()
        transformer = load_transformer(
            files.transformer, config, device, precision.transformer, lora=files.lora
        )
    return Models(transformer, vae, encode)


def _text_encoder(
    preset: Preset, files: ModelFiles, device: torch.device, precision: Precision
) -> Callable[[str], torch.Tensor]:
    from wanrt.weights.loading import load_text_encoder, load_tokenizer

    tokenizer = load_tokenizer(files.tokenizer, preset.transformer.text_len, preset.text.vocab)
    encoder = load_text_encoder(files.text_encoder, preset.text_config(), device, precision.text)
    return partial(_encode, encoder, tokenizer)


def _encode(encoder: UMT5Encoder, tokenizer: PromptTokenizer, prompt: str) -> torch.Tensor:
    from wanrt.models.text_encoder import encode_prompts

    return encode_prompts(encoder, tokenizer, [prompt])


def _vae(preset: Preset, files: ModelFiles, device: torch.device, precision: Precision) -> StreamingVae:
    from wanrt.weights.loading import load_vae

    config = preset.vae_config() if preset.vae.kind == "wan" else None
    vae = load_vae(files.vae, config, device, precision.vae)
    assert hasattr(vae, "encode_frame"), "load_vae gives streaming VAEs only"
    return vae  # type: ignore[return-value]


def _random_models(job: RenderJob, device: torch.device, precision: Precision, progress: Progress) -> Models:
    """No text encoder: with random weights an embedding of the prompt's hash says as much, and costs nothing."""
    from wanrt.models.transformer import WanTransformer
    from wanrt.models.vae import WanVae
    from wanrt.weights.loading import build_on_meta
    from wanrt.weights.random import random_weights

    preset = job.preset
    log.warning(
        "random weights: the picture means nothing; prompts are hashed, the text encoder is not loaded"
    )
    with _timed(progress, "VAE"):
        empty_vae = build_on_meta(lambda: WanVae(preset.vae_config()))
        vae = random_weights(empty_vae, job.seed, device, precision.vae)
    with _timed(progress, "transformer"):
        empty = build_on_meta(lambda: WanTransformer(preset.transformer_config()))
        transformer = random_weights(empty, job.seed, device, precision.transformer)
    encode = partial(hashed_embedding, preset.transformer.text_dim, device)
    return Models(transformer, vae, encode)


def hashed_embedding(dim: int, device: torch.device, prompt: str) -> torch.Tensor:
    """A random embedding `[1, 24, dim]` of its own for each prompt, the same on every machine."""
    import torch

    from wanrt.pipeline.noise import standard_normal

    key = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=16).digest(), "little")
    values = standard_normal(key, RANDOM_TOKENS * dim).reshape(1, RANDOM_TOKENS, dim)
    return torch.from_numpy(values).to(device)


def streaming_vae(models: Models, job: RenderJob, precision: Precision, *, graphs: bool) -> StreamingVae:
    """The VAE as a stream of this size runs it: on CUDA the repacked one, its calls as graphs; else as it is."""
    from wanrt.models.vae import WanVae

    vae = models.vae
    if not isinstance(vae, WanVae) or next(vae.parameters()).device.type != "cuda":
        return vae
    from wanrt.models.vae_fast import FastVae
    from wanrt.models.vae_graph import GraphedVae

    fast = FastVae(vae, dtype=precision.vae, encode_dtype=precision.vae)
    return GraphedVae(fast, width=job.width, height=job.height) if graphs else fast


def compile_blocks(transformer: WanTransformer) -> None:
    """Compiles each layer on its own: the layers share their graphs, so it takes seconds, not minutes."""
    import torch

    # Two graphs (the first layer has no residual to finish) for each context size, with and without bias; the
    # default of 8 ends in an error under fullgraph.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer.blocks:
        block.compile(fullgraph=True, dynamic=False)


@contextmanager
def _timed(progress: Progress, part: str) -> Iterator[None]:
    progress(part, None)
    started = time.perf_counter()
    yield
    progress(part, time.perf_counter() - started)
