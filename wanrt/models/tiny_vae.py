"""TAEHV: a tiny convolutional stand-in for the Wan VAE, decoding in a few per cent of its time.

Only 2-D convolutions; time enters through blocks that also see the frame before (`MemBlock`), through 1x1
convolutions over pairs of frames (`TPool`) and through ones that make two frames of one (`TGrow`). Quality is
below the full VAE's: for previews and for devices without room.

Architecture and tensor names: madebyollin/taehv `taehv.py` at 1f14a56 (base variant: `taew2_1.pth` for Wan2.1).
LightTAE (ModelTC/LightX2V f8aee98, `lighttaew2_1.pth`) has the same tensors over un-normalised Wan latents.

Shapes and layout: see `wanrt.models.vae_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.models.vae_stream import StreamingVae, VaeState, clip_of, frames_of, interleave, zero_frames

MEM_BLOCKS = 3  # per level
LEVELS = 3  # each halves height and width


@dataclass(frozen=True)
class TinyVaeConfig:
    """Sizes of a TAEHV. The defaults are `taew2_1.pth`'s.

    `latents_mean` and `latents_std` are None when the network itself works on normalised latents (TAEHV) and
    Wan's 16 values when it does not (LightTAE).
    """

    latent_channels: int = 16
    patch_size: int = 1
    encoder_width: int = 64
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_time_downscale: tuple[bool, bool, bool] = (True, True, False)
    decoder_time_upscale: tuple[bool, bool, bool] = (False, True, True)
    latents_mean: tuple[float, ...] | None = field(default=None, repr=False)
    latents_std: tuple[float, ...] | None = field(default=None, repr=False)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame."""
        return 2 ** sum(self.decoder_time_upscale)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, each way."""
        return 2**LEVELS * self.patch_size

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> TinyVaeConfig:
        """Sizes of the TAEHV whose tensors (original names) have these shapes.

        Raises `KeyError` when the names are not a base TAEHV's (the `_super` variants have others).
        """
        level = MEM_BLOCKS + 2
        pools = [shapes[f"encoder.{2 + level * i}.conv.weight"] for i in range(LEVELS)]
        grows = [shapes[f"decoder.{7 + (level + 1) * i}.conv.weight"] for i in range(LEVELS)]
        return cls(
            latent_channels=shapes["decoder.1.weight"][1],
            patch_size=round((shapes["encoder.0.weight"][1] / 3) ** 0.5),
            encoder_width=shapes["encoder.0.weight"][0],
            decoder_widths=(*(shape[1] for shape in grows), shapes["decoder.22.weight"][1]),  # type: ignore[arg-type]
            encoder_time_downscale=tuple(shape[1] > shape[0] for shape in pools),  # type: ignore[arg-type]
            decoder_time_upscale=tuple(shape[0] > shape[1] for shape in grows),  # type: ignore[arg-type]
        )


class MemBlock(nn.Module):
    """Residual block over each frame and the one before it. `path` is its key in a `VaeState`."""

    path = ""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {
                "0": nn.Conv2d(dim * 2, dim, 3, padding=1),
                "2": nn.Conv2d(dim, dim, 3, padding=1),
                "4": nn.Conv2d(dim, dim, 3, padding=1),
            }
        )

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, C, T, H, W] -> the same; before a stream's first frame there are zeros."""
        past = frames_of(self._past(x, state).contiguous(memory_format=torch.channels_last_3d))
        frames = frames_of(x)
        y = F.relu(self.conv["0"](torch.cat([frames, past], dim=1)))
        y = F.relu(self.conv["2"](y))
        return clip_of(F.relu(self.conv["4"](y) + frames), x.shape[0])

    def _past(self, x: Tensor, state: VaeState | None) -> Tensor:
        if state is not None and state.started:
            return state.window(self.path, x)[:, :, :-1]
        if state is not None:
            state.store(self.path, x[:, :, -1:])
        return torch.cat([zero_frames(x, 1), x[:, :, :-1]], dim=2)


class TPool(nn.Module):
    """1x1 convolution over pairs of frames (or single ones, if not `halve`)."""

    def __init__(self, dim: int, *, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.conv = nn.Conv2d(dim * (1 + halve), dim, 1, bias=False)

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T/2 or T, H, W]."""
        if self.halve:
            x = torch.cat([x[:, :, ::2], x[:, :, 1::2]], dim=1)
        return clip_of(self.conv(frames_of(x)), x.shape[0])


class TGrow(nn.Module):
    """1x1 convolution that makes two frames of one (or one, if not `doubling`)."""

    def __init__(self, dim: int, *, doubling: bool) -> None:
        super().__init__()
        self.doubling = doubling
        self.conv = nn.Conv2d(dim, dim * (1 + doubling), 1, bias=False)

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T or T, H, W]."""
        x = clip_of(self.conv(frames_of(x)), x.shape[0])
        return interleave(x) if self.doubling else x


class FrameConv(nn.Conv2d):
    """3x3 convolution of every frame alone."""

    def __init__(self, dim_in: int, dim_out: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(dim_in, dim_out, 3, padding=1, stride=stride, bias=bias)

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, dim_in, T, H, W] -> [B, dim_out, T, H/stride, W/stride]."""
        return clip_of(super().forward(frames_of(x)), x.shape[0])


class Stack(nn.Module):
    """Blocks run in order, under the indices that `nn.Sequential` gave them in the checkpoint."""

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for index, block in blocks.items():
            self.add_module(str(index), block)

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """Run every block with the stream's state."""
        for block in self.children():
            x = block(x, state)
        return x


class SoftClamp(nn.Module):
    """3 tanh(x / 3): latents out of the decoder's range are squashed, not trusted."""

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """Elementwise."""
        return torch.tanh(x / 3) * 3


class Relu(nn.Module):
    """ReLU between blocks."""

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """Elementwise."""
        return F.relu(x)


class Double(nn.Module):
    """Nearest-neighbour upscaling of every frame by two."""

    def forward(self, x: Tensor, state: VaeState | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, 2H, 2W]."""
        return clip_of(F.interpolate(frames_of(x), scale_factor=2.0, mode="nearest"), x.shape[0])


def _encoder(config: TinyVaeConfig) -> Stack:
    width = config.encoder_width
    layers: list[nn.Module] = [FrameConv(3 * config.patch_size**2, width), Relu()]
    for halve in config.encoder_time_downscale:
        layers += [TPool(width, halve=halve), FrameConv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width) for _ in range(MEM_BLOCKS)]
    layers.append(FrameConv(width, config.latent_channels))
    return Stack(dict(enumerate(layers)))


def _decoder(config: TinyVaeConfig) -> Stack:
    widths = config.decoder_widths
    layers: list[nn.Module] = [SoftClamp(), FrameConv(config.latent_channels, widths[0]), Relu()]
    for (dim_in, dim_out), doubling in zip(pairwise(widths), config.decoder_time_upscale, strict=True):
        layers += [MemBlock(dim_in) for _ in range(MEM_BLOCKS)]
        layers += [Double(), TGrow(dim_in, doubling=doubling), FrameConv(dim_in, dim_out, bias=False)]
    layers += [Relu(), FrameConv(widths[-1], 3 * config.patch_size**2)]
    return Stack(dict(enumerate(layers)))


class TinyVae(StreamingVae):
    """TAEHV. Parameters have the original names, so `taew2_1.pth` loads with `strict=True`.

    Decoding equals taehv's `decode_video` (whose first `temporal_factor - 1` frames are dropped). Encoding a lone
    frame equals its `encode_video` (the frame repeated to a group). Longer streams keep Wan's alignment: the first
    frame stands alone, repeated, then whole groups; taehv itself groups from frame 0 and repeats the last frame,
    which would need frames of the future.
    """

    def __init__(self, config: TinyVaeConfig) -> None:
        channels = config.latent_channels
        super().__init__(config.latents_mean or (0.0,) * channels, config.latents_std or (1.0,) * channels)
        self.config = config
        self.latent_channels = channels
        self.spatial_factor = config.spatial_factor
        self.temporal_factor = config.temporal_factor
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self._finish_init()

    def decode_train(self, latents: Tensor) -> Tensor:
        """Decode whole clips in one differentiable pass: [B, C, T, h, w] -> [B, 3, 1 + 4(T-1), H, W], unclamped.

        Raises `ValueError` for a wrong shape.
        """
        return self._to_pixels(self.decoder(self._enter_decoder(latents)))[:, :, self.temporal_factor - 1 :]

    def encode_train(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Encode whole clips in one differentiable pass: [B, 3, 1 + 4k, H, W] -> (mean, None), mean as `encode`.

        There is no variance: TAEHV is no variational encoder. Raises `ValueError` for a wrong shape.
        """
        x = self._enter_encoder(pixels, first=1)
        start = x[:, :, :1].expand(-1, -1, self.temporal_factor - 1, -1, -1)
        return self._moments(self._encode_group(torch.cat([start, x], dim=2), None))

    def _decode_latent(self, z: Tensor, state: VaeState) -> Tensor:
        frames = self._to_pixels(self.decoder(z, state))
        return frames if state.started else frames[:, :, -1:]

    def _to_pixels(self, y: Tensor) -> Tensor:
        """The network's own range is [0, 1], in patches."""
        if self.config.patch_size > 1:
            y = clip_of(F.pixel_shuffle(frames_of(y), self.config.patch_size), y.shape[0])
        return y * 2 - 1

    def _encode_group(self, x: Tensor, state: VaeState | None) -> Tensor:
        x = x * 0.5 + 0.5
        if x.shape[2] == 1:
            x = x.expand(-1, -1, self.temporal_factor, -1, -1)
        if self.config.patch_size > 1:
            x = clip_of(F.pixel_unshuffle(frames_of(x), self.config.patch_size), x.shape[0])
        return self.encoder(x.contiguous(memory_format=torch.channels_last_3d), state)

    def _moments(self, hidden: Tensor) -> tuple[Tensor, None]:
        mean = (hidden.to(self.mean.dtype) - self.mean) / self.std
        return mean.to(hidden.dtype), None
