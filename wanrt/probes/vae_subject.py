"""What a VAE probe looks at: one VAE behind a few callables, whatever its make.

A subject decodes and encodes whole clips without any carried state, and, where its interface allows it, opens
streams that carry state from call to call. The probe only ever compares these with each other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.models.vae_stream import StreamingVae
    from wanrt.script.preset import Preset

Step = Callable[[Tensor], Tensor]

log = logging.getLogger("wanrt.probes")

# Short names, and the preset whose VAE (and whose weights) they mean; None has no preset here.
NAMES = {"wan-tiny": "wan-tiny", "wan": "krea-14b", "lightvae": None, "taehv": None}


@dataclass(frozen=True)
class Subject:
    """One VAE under examination. Pixels [B, 3, T, H, W] in [-1, 1], latents [B, C, n, h, w].

    `decode_whole` and `encode_whole` take a whole clip in one go and keep nothing; `decode_call` is the decode
    that its users call with all latents (often the same function). `open_decoder` and `open_encoder` start a
    stream and return its step, or are None when the interface forgets its state at every call.
    """

    name: str
    weights: str
    module: nn.Module
    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    decode_whole: Step
    decode_call: Step
    encode_whole: Step | None = None  # None: only the decoder is examined
    open_decoder: Callable[[], Step] | None = None
    open_encoder: Callable[[], Step] | None = None
    encode_frame: Step | None = None
    state_bytes: Callable[[Tensor], int] | None = (
        None  # a first latent -> bytes its stream's state then holds
    )
    size: tuple[int, int] = (224, 128)  # width x height for the questions about time
    short_clip: int = 5  # latents that surely decode in one call
    grid: tuple[int, int] = (8, 6)  # latent positions, width x height, for the questions about values
    small_grid: tuple[int, int] = (2, 2)  # the same for long clips
    paint: Callable[[int, int, int], Tensor] | None = (
        None  # frames, height, width -> a clip as it was trained on
    )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.module.parameters()).dtype

    def picture(self, latents: int, grid: tuple[int, int], *, familiar: bool = False) -> Tensor:
        """A moving picture that encodes to so many latents of `grid` (width, height) positions.

        `familiar`: of the kind that the VAE was trained on, where that is known.
        """
        frames = 1 + (latents - 1) * self.temporal_factor
        width, height = (side * self.spatial_factor for side in grid)
        paint = self.paint if familiar and self.paint is not None else moving_picture
        return paint(frames, height, width).to(self.device, self.dtype)

    def clip(self, latents: int, grid: tuple[int, int]) -> Tensor:
        """Latents in which neighbours in time are alike, as in a video, [1, C, latents, h, w].

        The encoding of `picture`; for a lone decoder, noise that changes slowly.
        """
        if self.encode_whole is not None:
            with torch.no_grad():
                return self.encode_whole(self.picture(latents, grid))
        shape = (1, self.latent_channels, 2, grid[1], grid[0])
        a, b = torch.randn(shape, generator=torch.Generator().manual_seed(7)).split(1, dim=2)
        turn = (0.3 * torch.arange(latents)).view(1, 1, -1, 1, 1)
        return (a * turn.cos() + b * turn.sin()).to(self.device, self.dtype)


def moving_picture(frames: int, height: int, width: int) -> Tensor:
    """A disc that circles over a drifting gradient, [1, 3, frames, height, width] in [-1, 1]."""
    t = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1)
    y = torch.linspace(-1, 1, height).view(1, -1, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, -1)
    wave = torch.sin(3 * x + 2 * y + 0.2 * t)
    away = (x - 0.6 * torch.cos(0.15 * t)).square() + (y - 0.6 * torch.sin(0.15 * t)).square()
    disc = torch.sigmoid((0.08 - away) * 60)
    sky = torch.stack([0.3 * wave, 0.5 * y.expand_as(wave), 0.4 - 0.4 * wave])
    ball = torch.tensor([0.9, -0.5, -0.6]).view(3, 1, 1, 1)
    return (sky * (1 - disc) + ball * disc).unsqueeze(0)


def tiny_world(frames: int, height: int, width: int) -> Tensor:
    """A clip of the world that wan-tiny was trained on, [1, 3, frames, height, width] in [-1, 1]."""
    from wanrt.tiny.scenes import scene
    from wanrt.tiny.world import World

    ball = scene(shape="ball", colour="red", motion="circling", background="ocean")
    return World(height, width).render(ball, torch.arange(frames))[0]


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Seeded weights that keep activations near unit scale, so that no layer hides what lies before it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and parameter[0].numel() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))


def streaming_subject(
    vae: StreamingVae, name: str, weights: str, size: tuple[int, int] = (224, 128)
) -> Subject:
    """A subject from one of wanrt's own VAEs."""

    def opener(run: Callable[..., Tensor], make_state: Callable[[], Any]) -> Callable[[], Step]:
        def start() -> Step:
            state = make_state()
            return lambda piece: run(piece, state)

        return start

    return Subject(
        name=name,
        weights=weights,
        module=vae,
        latent_channels=vae.latent_channels,
        spatial_factor=vae.spatial_factor,
        temporal_factor=vae.temporal_factor,
        decode_whole=vae.decode_train,  # type: ignore[arg-type]
        encode_whole=lambda pixels: vae.encode_train(pixels)[0],  # type: ignore[operator]
        decode_call=lambda latents: vae.decode(latents, vae.decoder_state()),
        open_decoder=opener(vae.decode, vae.decoder_state),
        open_encoder=opener(vae.encode, vae.encoder_state),
        encode_frame=vae.encode_frame,
        state_bytes=lambda latent: _state_bytes(vae, latent),
        size=size,
    )


def _state_bytes(vae: StreamingVae, latent: Tensor) -> int:
    state = vae.decoder_state()
    vae.decode(latent, state)
    return state.nbytes


def open_subject(
    spec: str,
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    weights: Path | None = None,
    random_weights: bool = False,
) -> Subject:
    """The VAE that `spec` names: one of `NAMES`, a preset, `diffusers:CLASS`, or a checkpoint file or directory.

    A name or preset whose weights are found (as `wanrt weights check` finds them, `weights` first) uses these
    unless `random_weights`; otherwise the weights are random, from `seed`, and the subject says so.
    Raises `UsageError` for a name that is none of these.
    """
    if spec.startswith("diffusers:"):
        from wanrt.probes.vae_family import diffusers_subject

        return diffusers_subject(spec.removeprefix("diffusers:"), device=device, dtype=dtype, seed=seed)
    preset = _preset(spec)
    if preset is None and spec not in NAMES:
        if not Path(spec).exists():
            raise UsageError(_unknown(spec))
        return _file(Path(spec), device, dtype)
    found = None if random_weights or preset is None else _find(preset, weights)
    if found is not None:
        subject = _file(found, device, dtype, name=spec)
        return (
            replace(subject, paint=tiny_world) if preset is not None and preset.weights.embedded else subject
        )
    log.info(
        "%s: %s", spec, "random weights, as asked" if random_weights else "no weights found, so random ones"
    )
    vae = _empty(spec, preset)
    randomise(vae, seed)
    return streaming_subject(_ready(vae, device, dtype), spec, f"random weights, seed {seed}")


def _preset(name: str) -> Preset | None:
    """The model preset whose VAE `name` asks for, if there is one."""
    from wanrt.script.preset import load_preset, preset_names

    name = NAMES.get(name) or name
    return load_preset(name) if name in preset_names() else None


def _find(preset: Preset, weights: Path | None) -> Path | None:
    from wanrt.weights.registry import find_parts, search_directories

    return find_parts(preset, search_directories(weights)).get("vae")


def _empty(spec: str, preset: Preset | None) -> StreamingVae:
    from wanrt.models.tiny_vae import TinyVae, TinyVaeConfig
    from wanrt.models.vae import VaeConfig, WanVae

    if spec == "taehv":
        return TinyVae(TinyVaeConfig())
    return WanVae(preset.vae_config() if preset is not None else VaeConfig(base_dim=24))


def _unknown(spec: str) -> str:
    from wanrt.script.preset import preset_names

    known = ", ".join(dict.fromkeys((*NAMES, *preset_names())))
    return f"--vae: got {spec!r}, expected one of {known}, diffusers:CLASS, or a checkpoint that exists"


def _file(path: Path, device: str, dtype: torch.dtype, name: str | None = None) -> Subject:
    from wanrt.weights.loading import load_vae

    vae: Any = load_vae(path, None, device, dtype)
    return streaming_subject(_ready(vae, device, dtype), name or path.name, f"weights of {path.name}")


def _ready(vae: Any, device: str, dtype: torch.dtype) -> Any:
    return vae.to(device, dtype).eval().requires_grad_(False).to_channels_last()


def attempt(decode: Step, latents: Tensor) -> Tensor | None:
    """Pixels, or None where the decoder refuses the length; a refusal is an answer, too."""
    try:
        return decode(latents)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as refusal:
        log.info("T=%d refused: %s", latents.shape[2], str(refusal).splitlines()[0])
        return None


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference as a share of `want`'s largest value; NaN counts as infinite."""
    scale = want.abs().max().clamp_min(1e-30)
    error = ((got.double() - want.double()).abs().max() / scale).item()
    return error if error == error else float("inf")


def rms_difference(got: Tensor, want: Tensor) -> float:
    """Root mean square difference as a share of `want`'s root mean square."""
    wide = want.double()
    return (
        (got.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-30)
    ).item()


@contextlib.contextmanager
def exact_arithmetic(module: nn.Module) -> Any:
    """The module in fp64 for the duration: rounding must not be taken for influence."""
    before = next(module.parameters()).dtype
    module.double()
    try:
        yield
    finally:
        module.to(before)
