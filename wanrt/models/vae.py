"""The Wan2.1 video VAE as a streaming module: weights without state, state without weights.

A latent frame is 16 channels at 1/8 of the picture's height and width. The first latent of a stream stands
for one pixel frame, every later one for four. The network is causal in time: every 3x3x3 convolution sees its
own frame and the two before it, so a stream can be decoded one latent at a time and encoded four frames at a
time if each convolution remembers the last two frames it saw. That memory is a `VaeState`, which the caller
holds.

Architecture, tensor names and constants: Wan-Video/Wan2.1 `wan/modules/vae.py` at 9737cba.

Shapes and layout: see `wanrt.models.vae_stream`; here h = H/8 and w = W/8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanrt.models.vae_stream import StreamingVae, VaeState, clip_of, frames_of, interleave, zero_frames

__all__ = ["VaeConfig", "VaeState", "WanVae"]

SPATIAL_FACTOR = 8  # pixels per latent, each way: three halvings
TEMPORAL_FACTOR = 4  # pixel frames per latent after the first: two halvings
HISTORY = 2  # frames that a temporal kernel of 3 looks back

# Wan-Video/Wan2.1 wan/modules/vae.py:630-637 at 9737cba, `WanVAE.__init__`.
WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of a Wan VAE. The defaults are Wan2.1's; LightVAE is `base_dim=24`, wan-tiny `base_dim=16`.

    LightVAE keeps a quarter of every width: ModelTC/LightX2V
    `lightx2v/models/video_encoders/hf/wan/vae.py:294` at f8aee98, `int(d * (1 - 0.75))`.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = field(default=WAN_LATENTS_MEAN, repr=False)
    latents_std: tuple[float, ...] = field(default=WAN_LATENTS_STD, repr=False)

    def __post_init__(self) -> None:
        for name in ("latents_mean", "latents_std"):
            got = len(getattr(self, name))
            if got != self.z_dim:
                raise ValueError(f"{name} has {got} values, expected one for each of z_dim={self.z_dim}")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} values, expected one between each "
                f"pair of the {len(self.dim_mult)} levels of dim_mult"
            )

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sequence[int]],
        latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN,
        latents_std: tuple[float, ...] = WAN_LATENTS_STD,
    ) -> VaeConfig:
        """Sizes of the VAE whose tensors (original names) have these shapes, at any width.

        Raises `KeyError` when the names are not a Wan VAE's.
        """
        base = shapes["encoder.conv1.weight"][0]
        widths, temporal, blocks = _encoder_levels(shapes)
        return cls(
            base_dim=base,
            z_dim=shapes["conv2.weight"][0],
            dim_mult=tuple(width // base for width in widths),
            num_res_blocks=blocks,
            temporal_downsample=tuple(temporal),
            latents_mean=latents_mean,
            latents_std=latents_std,
        )


def _encoder_levels(shapes: Mapping[str, Sequence[int]]) -> tuple[list[int], list[bool], int]:
    """From tensor shapes: width of each level, whether time is halved after it, residual blocks per level."""
    widths: list[int] = []
    temporal: list[bool] = []
    index = blocks = 0
    while True:
        prefix = f"encoder.downsamples.{index}."
        if f"{prefix}residual.6.weight" in shapes:
            width = shapes[f"{prefix}residual.6.weight"][0]
            blocks += 1
        elif f"{prefix}resample.1.weight" in shapes:
            widths.append(width)
            temporal.append(f"{prefix}time_conv.weight" in shapes)
        else:
            widths.append(width)
            return widths, temporal, blocks // len(widths)
        index += 1


def convolve_window(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve [B, C, T+2, H, W] with [O, C, 3, k, k]: valid in time, same size in space; [B, O, T, H, W].

    The one place that picks an implementation per device. CUDA: cuDNN's 3-D convolution in channels_last_3d.
    CPU: oneDNN's 2-D convolution over the three frames stacked as channels, because its fp32 3-D convolution
    is not vectorised (2 cores, 16 channels at 224x128, 4 frames: 91 ms against 8 ms; both 12 ms in bf16).
    """
    space = weight.shape[-1] // 2
    if window.is_cuda:
        return F.conv3d(window, weight, bias, padding=(0, space, space))
    taps = weight.shape[2]
    length = window.shape[2] - taps + 1
    stacked = torch.cat([window[:, :, i : i + length] for i in range(taps)], dim=1)
    kernel = weight.transpose(1, 2).flatten(1, 2)
    return clip_of(F.conv2d(frames_of(stacked), kernel, bias, padding=space), window.shape[0])


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees no later frame. `path` is its name in the VAE and the key of its state slot.

    Without a state the input is a whole clip behind zero history; a state that has not started takes one
    frame; a started state supplies the two frames before.
    """

    path = ""

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(dim_in, dim_out, kernel, padding="same")

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """Convolve `x` behind its history, [B, C, T, H, W] -> [B, O, T, H, W]; remember its last frames."""
        if self.kernel_size[0] == 1:
            return clip_of(F.conv2d(frames_of(x), self.weight[:, :, 0], self.bias), x.shape[0])
        if state is not None and state.started:
            return convolve_window(state.window(self.path, x), self.weight, self.bias)
        past = zero_frames(x, HISTORY)
        if state is not None:
            state.store(self.path, torch.cat([past[:, :, 1:], x], dim=2))
        if x.shape[2] == 1:
            return self.lone_frame(x)
        return convolve_window(torch.cat([past, x], dim=2), self.weight, self.bias)

    def lone_frame(self, x: Tensor) -> Tensor:
        """A first frame meets only the last time tap; the other two would multiply zeros. [B, C, 1, H, W]."""
        space = self.kernel_size[-1] // 2
        return F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=space).unsqueeze(2)


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma, the norm taken over channels."""

    def __init__(self, dim: int, spatial_dims: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, [B, C, ...], over C."""
        return F.normalize(x, dim=1) * (self.gamma * self.scale)


class ResidualBlock(nn.Module):
    """(norm, SiLU, causal 3x3x3 convolution) twice, plus the input (projected when the width changes)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        cube = (3, 3, 3)
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(dim_in),
                "2": CausalConv3d(dim_in, dim_out, cube),
                "3": RMSNorm(dim_out),
                "6": CausalConv3d(dim_out, dim_out, cube),
            }
        )
        self.shortcut = CausalConv3d(dim_in, dim_out, (1, 1, 1)) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, dim_in, T, H, W] -> [B, dim_out, T, H, W]."""
        layers = self.residual
        y = layers["2"](F.silu(layers["0"](x)), state)
        y = layers["6"](F.silu(layers["3"](y)), state)
        return y + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the h*w positions of each frame alone. No state: frames do not mix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """Mix the positions of each frame, [B, C, T, H, W]."""
        frames = frames_of(x)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + clip_of(self.proj(mixed.unflatten(2, frames.shape[2:])), x.shape[0])


class Upsample(nn.Module):
    """Twice the frames (if `temporal`; never for a stream's first frame), then twice the height and width."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C/2, T or 2T, 2H, 2W]."""
        if self.time_conv is not None:
            x = self._double_time(self.time_conv, x, state)
        frames = F.interpolate(frames_of(x), scale_factor=2.0, mode="nearest-exact")
        return clip_of(self.resample["1"](frames), x.shape[0])

    def _double_time(self, conv: CausalConv3d, x: Tensor, state: VaeState | None) -> Tensor:
        if state is not None and state.started:
            return interleave(conv(x, state))
        if state is not None:
            # The first frame skips the convolution and is not remembered either: its history starts at zero.
            state.store(conv.path, zero_frames(x, HISTORY))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], interleave(convolve_clip(conv, x[:, :, 1:]))], dim=2)


def convolve_clip(conv: CausalConv3d, x: Tensor) -> Tensor:
    """`conv` over a clip behind zero history, all three taps even for one frame."""
    return convolve_window(torch.cat([zero_frames(x, HISTORY), x], dim=2), conv.weight, conv.bias)


class Downsample(nn.Module):
    """Half the height and width, then half the frames (if `temporal`; never a stream's first frame)."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or T/2, H/2, W/2]."""
        # Wan pads only right and below.
        x = clip_of(self.resample["1"](F.pad(frames_of(x), (0, 1, 0, 1))), x.shape[0])
        return x if self.time_conv is None else self._halve_time(self.time_conv, x, state)

    def _halve_time(self, conv: CausalConv3d, x: Tensor, state: VaeState | None) -> Tensor:
        if state is not None and state.started:
            return _every_other(conv, state.window(conv.path, x))
        if state is not None:
            state.store(conv.path, x)
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], _every_other(conv, x)], dim=2)


def _every_other(conv: CausalConv3d, window: Tensor) -> Tensor:
    """Temporal convolution of stride 2 over 1 + 2n frames: n frames."""
    even, odd = window[:, :, ::2], window[:, :, 1::2]
    stacked = torch.cat([even[:, :, :-1], odd, even[:, :, 1:]], dim=1)
    kernel = conv.weight.transpose(1, 2).flatten(1, 2)
    return clip_of(F.conv2d(frames_of(stacked), kernel, conv.bias), window.shape[0])


def _residual_blocks(dim_in: int, dim_out: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(dim_out if block else dim_in, dim_out) for block in range(count)]


def _head(dim_in: int, dim_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": RMSNorm(dim_in), "2": CausalConv3d(dim_in, dim_out, (3, 3, 3))})


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


class _Half(nn.Module):
    """What encoder and decoder share: conv1, a run of blocks, and a head."""

    conv1: CausalConv3d
    head: nn.ModuleDict

    def blocks(self) -> list[nn.Module]:
        """Every block between `conv1` and `head`, in order."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: VaeState | None = None, *, recompute: bool = False) -> Tensor:
        """Run the half; `recompute` trades memory for time in training."""
        x = self.conv1(x, state)
        for block in self.blocks():
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x, state)
        return self.head["2"](F.silu(self.head["0"](x)), state)


class Encoder(_Half):
    """Pixels [B, 3, T, H, W] -> moments [B, 2*z_dim, 1 + (T-1)/4, h, w]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], (3, 3, 3))
        self.downsamples = nn.Sequential(*self._levels(config, widths))
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], config.z_dim * 2)

    @staticmethod
    def _levels(config: VaeConfig, widths: list[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for level, (dim_in, dim_out) in enumerate(pairwise(widths)):
            layers += _residual_blocks(dim_in, dim_out, config.num_res_blocks)
            if level < len(config.temporal_downsample):
                layers.append(Downsample(dim_out, temporal=config.temporal_downsample[level]))
        return layers

    def blocks(self) -> list[nn.Module]:
        """Down-sampling levels, then the middle."""
        return [*self.downsamples, *self.middle]


class Decoder(_Half):
    """Latents after `conv2` [B, z_dim, T, h, w] -> pixels [B, 3, 1 + 4(T-1), H, W]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        mult = config.dim_mult[::-1]
        widths = [config.base_dim * m for m in (mult[0], *mult)]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        self.upsamples = nn.Sequential(*self._levels(config, widths))
        self.head = _head(widths[-1], 3)

    @staticmethod
    def _levels(config: VaeConfig, widths: list[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        temporal = config.temporal_downsample[::-1]
        for level, (before, dim_out) in enumerate(pairwise(widths)):
            dim_in = before if level == 0 else before // 2  # each up-sampler halves the width
            layers += _residual_blocks(dim_in, dim_out, config.num_res_blocks + 1)
            if level < len(temporal):
                layers.append(Upsample(dim_out, temporal=temporal[level]))
        return layers

    def blocks(self) -> list[nn.Module]:
        """The middle, then the up-sampling levels."""
        return [*self.middle, *self.upsamples]


class WanVae(StreamingVae):
    """The Wan2.1 VAE. Parameters have the original names, so `Wan2.1_VAE.pth` loads with `strict=True`.

    On CUDA call `to_channels_last()` once after loading.

    `encode_frame` is purely 2-D here: a third of the arithmetic of the 3-D path, and no approximation, because
    zero history leaves only the last time tap of each kernel. So is the first call of `decode` and `encode`.
    `decode_train` and `encode_train` compute the same function over whole clips, differentiably.
    """

    spatial_factor = SPATIAL_FACTOR
    temporal_factor = TEMPORAL_FACTOR

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config.latents_mean, config.latents_std)
        self.config = config
        self.latent_channels = config.z_dim
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self._finish_init()

    def decode_train(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode whole clips in one differentiable pass: [B, z_dim, T, h, w] -> [B, 3, 1 + 4(T-1), H, W].

        Agrees with `decode` from a fresh state up to rounding, but is not clamped, so that gradients pass.
        `recompute` keeps only block inputs and recomputes the rest in the backward pass.

        Raises `ValueError` for a wrong shape.
        """
        return self.decoder(self.conv2(self._enter_decoder(latents)), recompute=recompute)

    def encode_train(self, pixels: Tensor, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """Encode whole clips in one differentiable pass: [B, 3, 1 + 4k, H, W] -> (mean, logvar).

        Both are [B, z_dim, 1 + k, h, w] and describe the normalised latent; the raw logvar is clamped to
        [-30, 20] as in Wan2.1 `WanVAE_.sample`. `recompute` as in `decode_train`.

        Raises `ValueError` for a wrong shape or frame count.
        """
        return self._moments(self.encoder(self._enter_encoder(pixels, first=1), recompute=recompute))

    def _decode_latent(self, z: Tensor, state: VaeState) -> Tensor:
        return self.decoder(self.conv2(z), state)

    def _encode_group(self, x: Tensor, state: VaeState | None) -> Tensor:
        return self.encoder(x, state)

    def _moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.conv1(hidden).to(self.mean.dtype).chunk(2, dim=1)
        mean = (mean - self.mean) / self.std
        logvar = logvar.clamp(-30.0, 20.0) - 2 * self.std.log()
        return mean.to(hidden.dtype), logvar.to(hidden.dtype)
