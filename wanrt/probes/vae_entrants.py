"""Who runs in `wanrt bench --vae`: wanrt's VAE as its pipeline runs it, the plain module, and independent decoders.

All of them have the same random weights. An entrant is a handful of calls without arguments, each under the name
that equal work of another entrant has, so that times under one name can be divided. A call that an implementation
does not offer is not there: diffusers and fastvae forget their state at every call, so they have no next latent.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.models import load_streaming_vae, streaming_vae
from wanrt.pipeline.progress import unheard

if TYPE_CHECKING:
    from wanrt.models.vae import WanVae
    from wanrt.pipeline.codec import StreamingVae
    from wanrt.pipeline.devices import Precision
    from wanrt.script import RenderJob

SEED = 5

DECODE, ENCODE, ANCHOR, CHUNK, CLIP = "decode", "encode", "anchor", "chunk", "clip"
CALLS = {
    DECODE: "next latent",
    ENCODE: "encode a lone frame",
    ANCHOR: "anchor path",
    CHUNK: f"chunk of {CHUNK_LATENTS} latents",
    CLIP: "whole clip, a latent",
}


class UnavailableError(Exception):
    """This implementation cannot run here; the message says why."""


@dataclass(frozen=True)
class Course:
    """What every entrant of one size is given.

    job: its preset is a Wan VAE's; random weights. latents: normalised fp32 `[1, z, T, h, w]`, T at least 4.
    frame: fp32 pixels `[1, 3, 1, H, W]` in [-1, 1].
    """

    job: RenderJob
    device: torch.device
    precision: Precision
    graphs: bool
    latents: Tensor
    frame: Tensor

    @classmethod
    def of(
        cls, job: RenderJob, device: torch.device, precision: Precision, *, graphs: bool, clip: int
    ) -> Course:
        """The course of a job's size, with a clip of so many latents."""
        generator = torch.Generator().manual_seed(SEED)
        height, width = job.latent_size
        channels = job.preset.vae_config().z_dim
        latents = torch.randn((1, channels, clip, height, width), generator=generator)
        frame = torch.rand((1, 3, 1, job.height, job.width), generator=generator) * 2 - 1
        return cls(job, device, precision, graphs, latents.to(device), frame.to(device))

    def weights(self) -> WanVae:
        """The plain module with the weights that all entrants have; the caller's own copy, in `precision.vae`."""
        return load_streaming_vae(self.job, None, self.device, self.precision, unheard)  # type: ignore[return-value]

    @property
    def usual_dtype(self) -> torch.dtype:
        """What the independent implementations are usually run in: bf16 on CUDA, fp32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Entrant:
    """One implementation, ready to be timed. `decode_clip` takes normalised latents from a stream's first one on."""

    dtype: torch.dtype
    calls: dict[str, Callable[[], object]]
    decode_clip: Callable[[Tensor], Tensor]
    state_bytes: Callable[[], int] | None = None  # of the decoder, between calls; None: it keeps none


def open_wanrt(course: Course) -> Entrant:
    """The VAE as the pipeline runs it on this device."""
    vae = streaming_vae(course.weights(), course.job, course.precision, graphs=course.graphs)
    return _streaming(vae, course)


def open_plain(course: Course) -> Entrant:
    """wanrt's plain streaming module, eager. Raises `UnavailableError` where it is what the pipeline runs."""
    if course.device.type != "cuda":
        raise UnavailableError("on a CPU it is what wanrt runs")
    return _streaming(course.weights().to_channels_last(), course)


def open_diffusers(course: Course) -> Entrant:
    """`AutoencoderKLWan` of diffusers, as it comes. Raises `UnavailableError` where it is not installed."""
    twin = diffusers_twin(course.weights(), course.usual_dtype)
    decode = _decode_raw(course, course.usual_dtype, lambda raw: twin.decode(raw, return_dict=False)[0])
    frame = course.frame.to(course.usual_dtype)
    calls = {
        CLIP: lambda: decode(course.latents),
        ENCODE: lambda: twin.encode(frame).latent_dist.mean,
    }
    return Entrant(course.usual_dtype, calls, decode)


def open_fastvae(course: Course) -> Entrant:
    """`FastVAEDecoder` of the package fastvae, as it comes: it has no encoder.

    Raises `UnavailableError` without CUDA, Triton, diffusers or fastvae itself.
    """
    if course.device.type != "cuda":
        raise UnavailableError("needs a CUDA device")
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("needs Triton, which is not installed")
    return fastvae_entrant(course, _installed("fastvae", "pip install fastvae"))


def fastvae_entrant(course: Course, fastvae: Any) -> Entrant:
    """The entrant of the imported package fastvae, wherever its kernels run."""
    twin = diffusers_twin(course.weights(), course.usual_dtype)
    decoder = fastvae.FastVAEDecoder.from_vae(twin).to(course.device)
    decode = _decode_raw(course, course.usual_dtype, decoder.decode)
    return Entrant(course.usual_dtype, {CLIP: lambda: decode(course.latents)}, decode)


OPENERS: dict[str, Callable[[Course], Entrant]] = {
    "wanrt": open_wanrt,
    "plain": open_plain,
    "diffusers": open_diffusers,
    "fastvae": open_fastvae,
}


def _streaming(vae: StreamingVae, course: Course) -> Entrant:
    """Every call leaves the stream begun, so that its next latent is never its first."""
    state = vae.decoder_state()
    latent, chunk = course.latents[:, :, 1:2], course.latents[:, :, 1 : 1 + CHUNK_LATENTS]

    def decode_clip(latents: Tensor) -> Tensor:
        state.reset()
        return vae.decode(latents, state)

    def anchor() -> Tensor:  # as wanrt.pipeline.codec.LocalCodec
        return vae.encode_frame(vae.decode(latent, state)[:, :, -1:].clone()).float()

    with torch.inference_mode():
        decode_clip(course.latents[:, :, :1])
    calls: dict[str, Callable[[], object]] = {
        DECODE: lambda: vae.decode(latent, state),
        ENCODE: lambda: vae.encode_frame(course.frame),
        ANCHOR: anchor,
        CHUNK: lambda: [vae.decode(one, state) for one in chunk.split(1, dim=2)],
        CLIP: lambda: decode_clip(course.latents),
    }
    return Entrant(course.precision.vae, calls, decode_clip, lambda: state.nbytes)


def _decode_raw(
    course: Course, dtype: torch.dtype, decode: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A decoder of raw latents in `dtype` as one of normalised ones, like wanrt's."""
    config = course.job.preset.vae_config()
    mean, std = (
        torch.tensor(values, device=course.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return lambda latents: decode((latents * std + mean).to(dtype))


def _installed(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        if isinstance(missing, ModuleNotFoundError) and missing.name == name:
            raise UnavailableError(f"not installed: {remedy}") from missing
        raise UnavailableError(f"cannot be imported: {missing}") from missing


def diffusers_twin(vae: WanVae, dtype: torch.dtype) -> Any:
    """diffusers' `AutoencoderKLWan` with the weights of `vae`, beside them. Raises `UnavailableError` without it."""
    diffusers = _installed("diffusers", "pip install 'wanrt[test]'")
    names = _installed("diffusers.loaders.single_file_utils", "pip install 'wanrt[test]'")
    config = vae.config
    with torch.device(next(vae.parameters()).device):
        twin = diffusers.AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        )
    twin.load_state_dict(names.convert_wan_vae_to_diffusers(dict(vae.state_dict())))
    # the plain method: diffusers' own warns about modules that nobody asked to keep in fp32
    return torch.nn.Module.to(twin, dtype=dtype).eval().requires_grad_(False)


def measured_convolutions() -> AbstractContextManager[None]:
    """`torch.backends.cudnn.benchmark = True` inside the block: cuDNN times its likeliest algorithms once a shape."""
    cudnn = torch.backends.cudnn
    # `flags` switches cuDNN off unless told otherwise
    return cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=cudnn.allow_tf32)


@torch.inference_mode()
def reference_pixels(course: Course, latents: Tensor) -> Tensor:
    """diffusers' pixels of `latents` in fp32 without TF32, on the CPU. Raises as `open_diffusers`."""
    twin = diffusers_twin(course.weights(), torch.float32)
    decode = _decode_raw(course, torch.float32, lambda raw: twin.decode(raw, return_dict=False)[0])
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return decode(latents).cpu()
