"""The same structural questions for the video VAEs of diffusers: small random weights, one row each.

Nothing here reads a model's code or flags: each decoder is called with short clips of different lengths, with one
latent changed at a time, and its inner calls are counted. Width does not change the answers, so the models are
built narrow; depth does change the receptive field, so they are built as deep as their published defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wanrt.errors import UsageError
from wanrt.probes.vae_subject import Step, Subject, attempt, difference, randomise

STILL = 1e-6  # below this share of the scale an output did not change


@dataclass(frozen=True)
class Member:
    """A video VAE of diffusers at a small size."""

    title: str
    cls: str
    config: Mapping[str, Any]
    channels: int  # of the latents
    spatial: int = 8
    temporal: int = 4
    size: int = 2  # latent height and width
    prepare: Callable[[Any], None] = field(default=lambda vae: None, repr=False)
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5)
    clip: int = 9  # latents of the clip in which each is changed in turn
    short_clip: int = 5
    grid: tuple[int, int] = (8, 6)
    reach_clip: int = 45  # of the clip for history and future; shorter where attention spans all anyway
    decode: Callable[[Any, Tensor], Tensor] = field(default=lambda vae, z: vae.decode(z).sample, repr=False)


@dataclass(frozen=True)
class FamilyRow:
    """Question 7: what one VAE can do."""

    title: str
    cls: str
    frames: dict[int, int]  # latents in one call -> pixel frames; lengths it refuses are missing
    first_special: bool  # the first latent stands for fewer frames than the others
    minimum_t: int
    causal: bool
    bleed: float  # change of the earliest frames by a later latent, share of the scale
    bleed_without_norm: float  # the same with every GroupNorm made an identity
    history: int  # latents before its own that a pixel frame depends on, within `reach_clip`
    future: int  # latents after it, likewise
    clip: int  # latents of the clip in which each was changed in turn
    reach_clip: int  # latents of the clip in which only its second, then only its last was changed: the limit
    pieces: tuple[int, ...]  # latents per internal decoder call of that clip
    prefix_error: float  # decode of a prefix against the same frames of the whole, share of the scale

    @property
    def partial(self) -> str:
        """Whether part of a clip can be decoded exactly."""
        if self.causal and self.prefix_error <= 1e-4:
            return "yes, every prefix"
        if not self.causal and self.future < self.reach_clip - 1:
            return f"no: needs up to {self.future} later"
        return "no"

    @property
    def method(self) -> str:
        """How the decoder goes through time, judged by its calls."""
        total, count = sum(self.pieces), len(self.pieces)
        if count <= 1:
            return "one pass"
        if total > self.clip:
            return f"{count} overlapping tiles"
        small, large = min(self.pieces), max(self.pieces)
        return f"{count} chunks of {small if small == large else f'{small}-{large}'}, cached"


def _svd(vae: Any, z: Tensor) -> Tensor:
    batch, _, frames = z.shape[:3]
    flat = z.transpose(1, 2).flatten(0, 1)
    return vae.decode(flat, num_frames=frames).sample.unflatten(0, (batch, frames)).transpose(1, 2)


def _statistics(count: int) -> dict[str, list[float]]:
    return {"latents_mean": [0.0] * count, "latents_std": [1.0] * count}


_FOUR = (8, 8, 8, 8)
_WAN = {"base_dim": 4, "z_dim": 4, **_statistics(4)}

FAMILY = (
    Member("Wan 2.1", "AutoencoderKLWan", _WAN, 4),
    Member(
        "Wan 2.2 (5B)",
        "AutoencoderKLWan",
        {**_WAN, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        | {"decoder_base_dim": 8, "scale_factor_spatial": 16},
        4,
        spatial=16,
    ),
    Member(
        "CogVideoX",
        "AutoencoderKLCogVideoX",
        {"block_out_channels": _FOUR, "latent_channels": 4, "norm_num_groups": 2},
        4,
    ),
    Member(
        "HunyuanVideo",
        "AutoencoderKLHunyuanVideo",
        {"block_out_channels": _FOUR, "latent_channels": 4, "norm_num_groups": 2},
        4,
    ),
    Member(
        "HunyuanVideo 1.5",
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": (16,) * 5, "latent_channels": 4},
        4,
        size=1,
        spatial=16,
    ),
    Member(
        "LTX-Video",
        "AutoencoderKLLTXVideo",
        {"block_out_channels": _FOUR, "decoder_block_out_channels": _FOUR, "latent_channels": 8},
        8,
        spatial=32,
        temporal=8,
    ),
    Member(
        "LTX-2",
        "AutoencoderKLLTX2Video",
        {"block_out_channels": (8, 16, 32, 64), "decoder_block_out_channels": (8, 16, 32)}
        | {"latent_channels": 8},
        8,
        spatial=32,
        temporal=8,
    ),
    Member(
        "Mochi 1",
        "AutoencoderKLMochi",
        {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
        | {"latent_channels": 4, **_statistics(4)},
        4,
        temporal=6,
        reach_clip=15,
    ),
    Member(
        "Cosmos",
        "AutoencoderKLCosmos",
        {"encoder_block_out_channels": (8, 8, 16, 16), "decode_block_out_channels": (8, 16, 16, 16)}
        | {"attention_resolutions": (8,), "resolution": 64, "latent_channels": 4}
        | _statistics(4),
        4,
        temporal=8,
    ),
    Member(
        "SVD",
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        4,
        spatial=2,
        temporal=1,
        decode=_svd,
    ),
    Member(
        "Allegro",
        "AutoencoderKLAllegro",
        {"block_out_channels": _FOUR, "norm_num_groups": 2, "sample_size": 32},
        4,
        size=4,
        lengths=(1, 2, 3, 4, 5, 6, 7, 8, 10),
        clip=10,
        short_clip=10,
        grid=(4, 4),  # its tiles are this size
        reach_clip=22,
        prepare=lambda vae: vae.enable_tiling(),
        decode=lambda vae, z: vae.decode(z).sample.transpose(1, 2),  # comes out as [B, T, C, H, W]
    ),
    Member(
        "EasyAnimate (Magvit)",
        "AutoencoderKLMagvit",
        {"block_out_channels": list(_FOUR), "latent_channels": 4, "norm_num_groups": 2},
        4,
    ),
    Member(
        "Kandinsky 5 (KVAE)",
        "AutoencoderKLKVAEVideo",
        {"ch": 32, "ch_mult": (1, 1, 1, 1), "z_channels": 4},
        4,
        reach_clip=21,
    ),
    Member(
        "VidTok",
        "AutoencoderVidTok",
        {"ch": 32, "ch_mult": [1, 1, 1, 1]},
        4,
        size=1,
        decode=lambda vae, z: vae.decode(z),
    ),
)


def find_member(name: str) -> Member:
    """The member of this title or class. Raises `UsageError` naming all of them."""
    for member in FAMILY:
        if name.lower() in (member.title.lower(), member.cls.lower()):
            return member
    known = ", ".join(dict.fromkeys(member.cls for member in FAMILY))
    raise UsageError(f"--vae diffusers:{name}: no such video VAE here, expected one of {known}")


def build(member: Member, *, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with seeded weights. Raises `UsageError` when diffusers, or this class in it, is missing."""
    try:
        import diffusers
    except ImportError as missing:
        raise UsageError("diffusers is not installed: pip install 'wanrt[test]'") from missing
    cls = getattr(diffusers, member.cls, None)
    if cls is None:
        raise UsageError(f"diffusers {diffusers.__version__} has no {member.cls}: a newer one is needed")
    vae = cls(**member.config).eval().requires_grad_(False)
    randomise(vae, seed)
    member.prepare(vae)
    # The plain method: diffusers' own warns about modules that nobody asked to keep in fp32.
    return nn.Module.to(vae, device=device, dtype=dtype)


def diffusers_subject(name: str, *, device: str, dtype: torch.dtype, seed: int) -> Subject:
    """A probe subject from the decoder of a diffusers VAE: whole clips only, because its methods keep no state."""
    member = find_member(name)
    vae: Any = build(member, seed=seed, device=device, dtype=dtype)

    def decode(latents: Tensor) -> Tensor:
        return member.decode(vae, latents)

    return Subject(
        name=f"{member.title} ({member.cls})",
        weights=f"small random weights, seed {seed}",
        module=vae,
        latent_channels=member.channels,
        spatial_factor=member.spatial,
        temporal_factor=member.temporal,
        decode_whole=decode,
        decode_call=decode,
        size=(4 * member.spatial, 4 * member.spatial),
        short_clip=member.short_clip,
        grid=member.grid,
        small_grid=(max(2, member.size), max(2, member.size)),
    )


@torch.no_grad()
def examine(
    member: Member, *, clip: int | None = None, reach_clip: int | None = None, seed: int = 0
) -> FamilyRow:
    """Answer question 7 for one member, by calls alone, in fp64. The clips' lengths are the member's own."""
    clip, reach_clip = clip or member.clip, reach_clip or member.reach_clip
    vae = build(member, seed=seed, dtype=torch.float64)

    def run(latents: Tensor) -> Tensor:
        return member.decode(vae, latents)

    shape = (1, member.channels, clip, member.size, member.size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    frames = _frames(run, latents, member.lengths)
    whole = run(latents)
    special = _special(frames, whole.shape[2], clip)
    change = _change(run, latents, whole, special)
    with _without_group_norm(vae):
        plain = _change(run, latents, run(latents), special)
    history, future = _reach(run, member, reach_clip, special)
    return FamilyRow(
        title=member.title,
        cls=member.cls,
        frames=frames,
        first_special=special,
        minimum_t=min(frames, default=0),
        causal=_bleed(change) <= STILL,
        bleed=_bleed(change),
        bleed_without_norm=_bleed(plain),
        history=max(history, *(later - index for index, later in _pairs(change))),
        future=max(future, *(index - other for index, other in _pairs(change))),
        clip=clip,
        reach_clip=reach_clip,
        pieces=_pieces(vae, run, latents),
        prefix_error=_prefix_error(run, latents, whole, frames),
    )


def _frames(run: Step, latents: Tensor, lengths: tuple[int, ...]) -> dict[int, int]:
    frames = {}
    for length in lengths:
        pixels = attempt(run, latents[:, :, :length])
        if pixels is not None and pixels.abs().amax((0, 1, 3, 4)).min() > 0:  # blank: never decoded
            frames[length] = pixels.shape[2]
    return frames


def _special(frames: dict[int, int], total: int, clip: int) -> bool:
    return total % clip != 0 or frames.get(1, total) * clip < total


def _latent_frames(total: int, clip: int, special: bool) -> list[slice]:
    """Pixel frames of every latent."""
    if not special:
        each = total // clip
        return [slice(i * each, (i + 1) * each) for i in range(clip)]
    each = -(-(total - 1) // (clip - 1)) if (total - 1) % (clip - 1) else (total - 1) // (clip - 1)
    first = total - each * (clip - 1)
    return [slice(0, first)] + [slice(first + i * each, first + (i + 1) * each) for i in range(clip - 1)]


def _change(run: Step, latents: Tensor, whole: Tensor, special: bool) -> list[list[float]]:
    """[i][j]: change of the frames of latent j when latent i is replaced, share of the scale."""
    spans = _latent_frames(whole.shape[2], latents.shape[2], special)
    scale = whole.abs().max()
    rows = []
    for index in range(latents.shape[2]):
        changed = latents.clone()
        changed[:, :, index] = changed[:, :, index].flip(1) + 1.0
        moved = (run(changed) - whole).abs() / scale
        rows.append([float(moved[:, :, span].max()) for span in spans])
    return rows


def _reach(run: Step, member: Member, length: int, special: bool) -> tuple[int, int]:
    """Latents over which a change is felt to the last bit: later (of the second) and earlier (of the last)."""
    shape = (1, member.channels, length, member.size, member.size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain = run(latents)
    spans = _latent_frames(plain.shape[2], length, special)

    def touched(index: int) -> list[int]:
        changed = latents.clone()
        changed[:, :, index] += 1.0
        moved = (run(changed) - plain).abs().amax((0, 1, 3, 4))
        return [latent for latent, span in enumerate(spans) if moved[span].max() > 0]

    return max(touched(1), default=1) - 1, length - 1 - min(touched(length - 1), default=length - 1)


def _pairs(change: list[list[float]]) -> list[tuple[int, int]]:
    """(input, output) latents that depend on each other. Where tiles end matters, so every input counts."""
    return [(i, j) for i, row in enumerate(change) for j, value in enumerate(row) if value > 0]


def _bleed(change: list[list[float]]) -> float:
    return max((max(row[:index], default=0.0) for index, row in enumerate(change)), default=0.0)


def _pieces(vae: nn.Module, run: Step, latents: Tensor) -> tuple[int, ...]:
    """Latents per call of the decoder's first convolution."""
    decoder: Any = getattr(vae, "decoder", vae)
    sizes: list[int] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = inputs[0] if inputs else next(iter(kwargs.values()))
        sizes.append(first.shape[2] if first.ndim == 5 else first.shape[0])

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    run(latents)
    handle.remove()
    return tuple(sizes)


def _prefix_error(run: Step, latents: Tensor, whole: Tensor, frames: dict[int, int]) -> float:
    """The worst prefix that the decoder accepts, against the same frames of the whole decode."""
    each = -(-whole.shape[2] // latents.shape[2])
    first = whole.shape[2] - each * (latents.shape[2] - 1)
    regular = {n: count for n, count in frames.items() if count == first + each * (n - 1)}
    errors = [difference(run(latents[:, :, :n]), whole[:, :, :count]) for n, count in regular.items()]
    return max(errors, default=float("inf"))


@contextmanager
def _without_group_norm(vae: nn.Module) -> Iterator[None]:
    """Every GroupNorm an identity: its statistics span time, which is a way to bleed apart from convolutions."""
    handles = [
        module.register_forward_hook(lambda _m, inputs, _o: inputs[0])
        for module in vae.modules()
        if isinstance(module, nn.GroupNorm)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
