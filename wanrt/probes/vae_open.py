"""The VAE that a name on the command line means, opened for a probe."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanrt.errors import UsageError
from wanrt.probes.vae_subject import Subject, randomise, streaming_subject

if TYPE_CHECKING:
    from wanrt.models.vae_stream import StreamingVae
    from wanrt.script.preset import Preset

log = logging.getLogger("wanrt.probes")

# Short names, and the preset whose VAE (and whose weights) they mean; None has no preset here.
NAMES = {"wan-tiny": "wan-tiny", "wan": "krea-14b", "lightvae": None, "taehv": None}


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


def tiny_world(frames: int, height: int, width: int) -> Tensor:
    """A clip of the world that wan-tiny was trained on, [1, 3, frames, height, width] in [-1, 1]."""
    from wanrt.tiny.scenes import scene
    from wanrt.tiny.world import World

    ball = scene(shape="ball", colour="red", motion="circling", background="ocean")
    return World(height, width).render(ball, torch.arange(frames))[0]
