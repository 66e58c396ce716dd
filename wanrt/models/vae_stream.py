"""What every streaming video VAE here shares: the state object, the layout of clips, and the public methods.

Shape legend: B batch, C channels, T frames, H and W pixel height and width, h and w latent height and width.
Every 5-D activation is [B, C, T, H, W] in `torch.channels_last_3d` strides, so that its frames are also a
[B*T, C, H, W] `torch.channels_last` view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn


class VaeState:
    """What one stream of one half of a VAE remembers: the last frames each temporal convolution saw.

    Slots are keyed by the module's path in the VAE (`decoder.middle.0.residual.2`) and allocated by the first
    call; from then on their addresses never change: later calls, and later streams of the same size, update
    them in place, so a CUDA graph may hold them. A slot is [B, C, 2, h', w'] (oldest frame first), or one
    frame for the encoder's temporal down-samplers.

    Call order: a first call, then any number of steady calls; `reset()` starts a new stream. One state serves
    one stream; the weights hold nothing, so any number of streams can share them.
    """

    def __init__(self, half: str) -> None:
        self.half = half  # "decoder" or "encoder"
        self.slots: dict[str, Tensor] = {}
        self.started = False
        self.signature: tuple[object, ...] = ()

    def reset(self) -> None:
        """Start a new stream. Memory is kept: the first call overwrites every slot."""
        self.started = False

    @property
    def nbytes(self) -> int:
        """Bytes held by all slots."""
        return sum(slot.numel() * slot.element_size() for slot in self.slots.values())

    def store(self, path: str, frames: Tensor) -> None:
        """Overwrite (or allocate) the slot of `path` with `frames` [B, C, n, h', w']."""
        slot = self.slots.get(path)
        if slot is not None and _alike(slot, frames):
            slot.copy_(frames)
        else:
            self.slots[path] = frames.clone(memory_format=torch.channels_last_3d)

    def window(self, path: str, x: Tensor) -> Tensor:
        """The slot's n frames followed by `x`, [B, C, n+T, h', w']; the slot then holds the newest n."""
        slot = self.slots[path]
        window = torch.cat([slot, x], dim=2)
        slot.copy_(window[:, :, -slot.shape[2] :])
        return window

    def check(self, half: str, x: Tensor) -> None:
        """Refuse a state of the other half, or a stream that changes its size, dtype or device midway."""
        if self.half != half:
            raise ValueError(f"got a state made for the {self.half}, expected one from {half}_state()")
        signature = (x.shape[0], *x.shape[3:], x.dtype, x.device)
        if self.started and signature != self.signature:
            raise ValueError(
                f"stream changed: got (batch, height, width, dtype, device) {signature}, expected "
                f"{self.signature}: call reset() or make a new state"
            )
        self.signature = signature


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def own_memory(piece: Tensor) -> Tensor:
    """A slice in memory of its own: kernels are chosen by strides, and equal bits need equal kernels."""
    return piece.clone(memory_format=torch.channels_last_3d)


def frames_of(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last strides as its frames, [B*T, C, H, W]: a view, no copy."""
    return x.transpose(1, 2).flatten(0, 1)


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """Undo `frames_of`."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def zero_frames(x: Tensor, count: int) -> Tensor:
    """`count` frames of zeros like those of `x`."""
    return torch.zeros_like(x[:, :, :1]).expand(-1, -1, count, -1, -1)


def interleave(x: Tensor) -> Tensor:
    """[B, 2C, T, H, W] -> [B, C, 2T, H, W]: the first C channels are the even frames, the rest odd."""
    even, odd = x.chunk(2, dim=1)
    return torch.stack([even, odd], dim=3).flatten(2, 3).contiguous(memory_format=torch.channels_last_3d)


class StreamingVae(nn.Module):
    """A causal video VAE whose streams are cut anywhere: weights without state, state without weights.

    Latents are normalised, as the transformer sees them: (raw - mean) / std per channel. Pixels are floats in
    [-1, 1]. Both come back in the module's dtype. The first latent of a stream stands for one pixel frame, every
    later one for `temporal_factor` frames.

    The streaming methods update their state in place and therefore build no autograd graph.
    """

    latent_channels: int
    spatial_factor: int  # pixels per latent, each way
    temporal_factor: int  # pixel frames per latent after the first

    def __init__(self, latents_mean: Sequence[float], latents_std: Sequence[float]) -> None:
        super().__init__()
        self._statistics = (tuple(latents_mean), tuple(latents_std))
        self.register_load_state_dict_post_hook(lambda module, _: module._place_statistics())

    def _finish_init(self) -> None:
        """To be called when all layers exist: tell the stateful ones their path, place the statistics."""
        for path, module in self.named_modules():
            if hasattr(module, "path"):
                module.path = path
        self._place_statistics()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._place_statistics()
        return self

    def _place_statistics(self) -> None:
        """Latent mean and std beside the weights. Not buffers: `.bfloat16()` must not round them."""
        weight = next(self.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.mean, self.std = (
            torch.tensor(values, dtype=wide, device=weight.device).view(1, -1, 1, 1, 1)
            for values in self._statistics
        )

    @torch.no_grad()
    def to_channels_last(self) -> Self:
        """Keep convolution weights in the strides that clips have, so that no call repacks them. In place."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for weight in self.parameters():
            if weight.ndim in formats:
                weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
        return self

    def decoder_state(self) -> VaeState:
        """A fresh state for one stream of `decode`."""
        return VaeState("decoder")

    def encoder_state(self) -> VaeState:
        """A fresh state for one stream of `encode`."""
        return VaeState("encoder")

    @torch.no_grad()
    def decode(self, latents: Tensor, state: VaeState) -> Tensor:
        """Decode the next latents of a stream: [B, C, T, h, w] -> [B, 3, temporal_factor * T, H, W] in [-1, 1].

        A stream's first latent gives 1 frame instead. Latents are decoded one by one whatever T is, so the
        result and the state are bit-identical for every cut of a stream.

        Raises `ValueError` for a wrong shape, an encoder's state, or a size that changes within the stream.
        """
        z = self._enter_decoder(latents)
        state.check("decoder", z)
        pieces = []
        for frame in z.split(1, dim=2):
            pieces.append(self._decode_latent(own_memory(frame), state))
            state.started = True
        return torch.cat(pieces, dim=2).clamp_(-1.0, 1.0)

    @torch.no_grad()
    def encode(self, pixels: Tensor, state: VaeState) -> Tensor:
        """Encode the next pixel frames of a stream: [B, 3, T, H, W] -> [B, C, n, h, w], the mean.

        With groups of g = temporal_factor, a stream's first call takes T = 1 + g*k frames (n = 1 + k), later
        calls T = g*k (n = k). Frames are encoded group by group whatever T is, so every cut into whole groups
        gives the same bits.

        Raises `ValueError` for a wrong shape or frame count, a decoder's state, or a changed size.
        """
        x = self._enter_encoder(pixels, first=0 if state.started else 1)
        state.check("encoder", x)
        pieces = []
        if not state.started:
            pieces.append(self._encode_group(own_memory(x[:, :, :1]), state))
            state.started = True
            x = x[:, :, 1:]
        if x.shape[2]:
            groups = x.split(self.temporal_factor, dim=2)
            pieces.extend(self._encode_group(own_memory(group), state) for group in groups)
        # group by group to the end: a library may round a pointwise convolution by its batch size
        return torch.cat([self._moments(piece)[0] for piece in pieces], dim=2)

    @torch.no_grad()
    def encode_frame(self, pixels: Tensor) -> Tensor:
        """Encode frames that each start a stream: [B, 3, 1, H, W] -> [B, C, 1, h, w], the mean.

        The same function as `encode` with a fresh state, without keeping one.

        Raises `ValueError` for a wrong shape.
        """
        x = self._enter_encoder(pixels, first=1)
        if x.shape[2] != 1:
            raise ValueError(f"got {x.shape[2]} frames, expected 1: encode() takes clips")
        return self._moments(self._encode_group(x, None))[0]

    def _decode_latent(self, z: Tensor, state: VaeState) -> Tensor:
        """One latent to its pixel frames, unclamped."""
        raise NotImplementedError

    def _encode_group(self, x: Tensor, state: VaeState | None) -> Tensor:
        """One frame that starts a stream, or one group that continues it, to the encoder's raw output."""
        raise NotImplementedError

    def _moments(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised mean (and log-variance, where there is one) from the encoder's raw output."""
        raise NotImplementedError

    def _to_module(self, x: Tensor) -> Tensor:
        weight = next(self.parameters())
        return x.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _enter_decoder(self, latents: Tensor) -> Tensor:
        """Checked, raw latents; the affine map runs in fp32 at least."""
        _check_channels("latents", latents, self.latent_channels)
        return self._to_module(latents.to(self.mean.device, self.mean.dtype) * self.std + self.mean)

    def _enter_encoder(self, pixels: Tensor, *, first: int) -> Tensor:
        """Checked pixels; `first` is how many frames precede the groups of `temporal_factor`."""
        _check_channels("pixels", pixels, 3)
        frames, height, width = pixels.shape[2:]
        factor, group = self.spatial_factor, self.temporal_factor
        if height % factor or width % factor:
            raise ValueError(f"got {width}x{height} pixels, expected multiples of {factor}: resize or crop")
        if frames < first or (frames - first) % group:
            rule = f"1 + {group}k to start a stream" if first else f"{group}k to continue a stream"
            raise ValueError(
                f"got {frames} pixel frames, expected {rule}: hold frames back for a whole group"
            )
        return self._to_module(pixels)


def _check_channels(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or x.shape[2] < 1:
        raise ValueError(f"got {name} of shape {list(x.shape)}, expected [B, {channels}, T, H, W]")
