"""The Wan VAE's streaming decode and lone-frame encode, rearranged for a GPU. Same function, same state.

`FastVae` repacks the weights of a `WanVae` once and then computes what its `decode` and `encode_frame` compute:

- A causal 3x3x3 convolution with T frames and two remembered ones is a 3-D convolution without padding in time, or
  for T = 1 a 2-D convolution over the three frames stacked as channels. `wanrt_kernels.norm_stack` writes its input
  while it finishes the previous layer (bias, skip connection, RMSNorm, SiLU) and updates the stream's state in
  place. cuDNN does the rest in channels-last, or on Hopper `wanrt_kernels.conv_window`, for T = 1 and lone frames
  too; that one adds bias and skip connection itself.
- Nearest upsampling followed by a 3x3 convolution reads each input pixel up to nine times through four phases.
  Summing the taps that meet the same pixel gives four 2x2 kernels: one convolution with 4 C outputs on the small
  picture, 4/9 of the arithmetic; `norm_stack` reads its output in picture order.
- The decoder's affine un-normalisation and `conv2` are one 16-wide matrix in fp32. The `conv1` behind the encoder and
  the normalisation are folded into its last convolution, and the bias of its first one into that one's weights.

A biased convolution would cost PyTorch one more pass over its output, so cuDNN's biases are kept apart and ride
along in `Pending`. Batch is 1. Layout inside is [T, H, W, C]; a `VaeState` slot ([1, C, 2, H, W] in channels_last_3d
strides) is the same memory as [2, H, W, C], so plain and fast path can continue each other's streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanrt.models.vae import (
    AttentionBlock,
    CausalConv3d,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    RMSNorm,
    Upsample,
    VaeState,
    WanVae,
    convolve_window,
)
from wanrt_kernels.conv_window import conv_window, why_not
from wanrt_kernels.norm_stack import NO_MARGIN, Margin, norm_stack
from wanrt_kernels.softmax_rows import softmax_rows

TENSOR_CORE_CHANNELS = 8  # cuDNN's tensor-core kernels want channel counts that divide by 8
COLOURS = 3


@dataclass(frozen=True)
class Pending:
    """A convolution's raw output and what is still to be added to it.

    `x` is [T, H, W, C], or [T, H/2 + 1, W/2 + 1, 4C] when `shuffled`, with `margin` pixels at the edges that are then
    left out; `bias` [C]; `residual` [T, H, W, C].
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    shuffled: bool = False
    margin: Margin = NO_MARGIN

    @property
    def complete(self) -> bool:
        """Whether `x` is the total already."""
        return self.bias is None and self.residual is None and not self.shuffled

    def finish(
        self,
        scale: Tensor | None = None,
        state: Tensor | None = None,
        *,
        silu: bool = True,
        window: bool = False,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Add, normalise, and put together with the past; see `norm_stack`. `keep`: return the total too."""
        kept = self.x if keep and self.complete else None
        if self.complete and scale is None and state is None:
            return self.x, kept
        y, total = norm_stack(
            self.x,
            scale,
            bias=self.bias,
            residual=self.residual,
            state=state,
            unshuffle=self.shuffled,
            margin=self.margin,
            silu=silu,
            window=window,
            keep_total=keep and not self.complete,
        )
        return y, total if kept is None else kept


def conv2d_nhwc(x: Tensor, weight: Tensor, *, padding: int = 1, stride: int = 1) -> Tensor:
    """[N, H, W, C] x [O, C, k, k] (channels-last) -> [N, H', W', O], contiguous, without a bias."""
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding).permute(0, 2, 3, 1)
    return out.contiguous()  # a no-op on CUDA; CPU convolutions may choose another layout


def _channels_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _bias_of(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()


def _scale_of(norm: RMSNorm) -> Tensor:
    return norm.gamma.detach().float().flatten() * norm.scale


def conv3d_nhwc(window: Tensor, weight: Tensor) -> Tensor:
    """[T + 2, H, W, C] x [O, C, 3, 3, 3] (channels-last) -> [T, H, W, O], contiguous, without a bias."""
    out = convolve_window(window.permute(3, 0, 1, 2)[None], weight, None)
    return out[0].permute(1, 2, 3, 0).contiguous()  # a no-op on CUDA


class FastConv(nn.Module):
    """A causal convolution's weights twice: all time taps, for a stream under way, and the last tap alone.

    Args:
        conv: whose weights are repacked.
        dtype: of the copies.
        frames: that a stream under way brings at a time. For one, cuDNN is better off with a stack.
        pad_out: channels of zeros to add to its results.

    Attributes:
        biased: whether it has a bias; without, `bias` is zeros.
        windows: whether it takes windows of a stream under way, or stacks.
        why_cudnn: None, or why cuDNN convolves them.
        unread: rows of its results, at the top and the bottom, that nobody reads; (0, 0) unless set from outside.
    """

    steady: Tensor  # [O, C, 3, k, k] for windows, [O, 3C, k, k] for stacks
    last: Tensor
    bias: Tensor

    def __init__(self, conv: CausalConv3d, dtype: torch.dtype, frames: int = 1, *, pad_out: int = 0) -> None:
        super().__init__()
        self.path = conv.path
        self.biased = conv.bias is not None
        self.unread = (0, 0)
        weight = F.pad(conv.weight.detach().float(), (0, 0) * 4 + (0, pad_out))
        self.why_cudnn: str | None = "not 3x3x3"
        if conv.kernel_size == (3, 3, 3):
            self.why_cudnn = why_not(weight.device, weight.shape[1], weight.shape[0], dtype)
        self.windows = frames > 1 or self.why_cudnn is None
        if self.windows:
            steady = weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        else:
            steady = _channels_last(weight.transpose(1, 2).flatten(1, 2), dtype)
        self.register_buffer("steady", steady)
        self.register_buffer("last", _channels_last(weight[:, :, -1], dtype))
        self.register_buffer("bias", F.pad(_bias_of(conv).float(), (0, pad_out)))

    def pending(self, x: Tensor, skip: Tensor | None = None) -> Pending:
        """The convolution of `x` plus bias and `skip` [T, H, W, O], which cuDNN leaves to be added."""
        if self.why_cudnn is None:
            return Pending(self(x, self.bias, skip))
        return Pending(self(x), self.bias if self.biased else None, skip)

    def forward(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Convolve a window [T + 2, H, W, C], stacks [T, H, W, 3C], or a lone frame [1, H, W, C] of a start.

        Only wanrt's own kernel takes a `bias` and a `residual` to add.
        """
        if self.why_cudnn is None:
            return self._by_kernel(x, bias, residual)
        assert bias is None
        assert residual is None
        if x.shape[-1] != self.last.shape[1]:
            return conv2d_nhwc(x, self.steady, padding=self.last.shape[-1] // 2)
        if self.windows and x.shape[0] > 1:
            return conv3d_nhwc(x, self.steady)
        return conv2d_nhwc(x, self.last, padding=self.last.shape[-1] // 2)

    def _by_kernel(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        weight = self.steady if x.shape[0] > 1 else self.last
        rows = self.unread[0], x.shape[1] - self.unread[1]
        return conv_window(x, weight.movedim(1, -1).flatten(1), rows, bias=bias, residual=residual)


class Stream:
    """One call's view of a `VaeState`: slots as [2, H, W, C], or none for a lone frame."""

    def __init__(self, state: VaeState | None) -> None:
        self.state = state
        self.steady = state is not None and state.started

    def feed(self, pending: Pending, conv: FastConv, scale: Tensor | None, *, keep: bool) -> tuple:
        """Prepare `conv`'s input from `pending` and remember it. Returns (input, total or None)."""
        if self.steady:
            assert self.state is not None
            slot = self.state.slots[conv.path].permute(0, 2, 3, 4, 1)[0]
            return pending.finish(scale, slot, window=conv.windows, keep=keep)
        y, total = pending.finish(scale, keep=keep)
        if self.state is not None:
            self.state.store(
                conv.path, torch.stack([torch.zeros_like(y[0]), y[0]])[None].permute(0, 4, 1, 2, 3)
            )
        return y, total

    def forget(self, conv: FastConv, frame: Tensor) -> None:
        """Zero history for a convolution that the first frame skips. `frame` is [1, H, W, C]."""
        if self.state is not None:
            self.state.store(conv.path, frame.new_zeros(2, *frame.shape[1:])[None].permute(0, 4, 1, 2, 3))


class FastResidual(nn.Module):
    """(norm, SiLU, convolution) twice plus the skip connection."""

    scale1: Tensor
    scale2: Tensor

    def __init__(self, block: ResidualBlock, dtype: torch.dtype, frames: int) -> None:
        super().__init__()
        layers: Any = block.residual
        self.conv1 = FastConv(layers["2"], dtype, frames)
        self.conv2 = FastConv(layers["6"], dtype, frames)
        self.register_buffer("scale1", _scale_of(layers["0"]))
        self.register_buffer("scale2", _scale_of(layers["3"]))
        self.shortcut: FastConv | None = None
        if isinstance(block.shortcut, CausalConv3d):
            self.shortcut = FastConv(block.shortcut, dtype)
            self.conv2.bias = self.conv2.bias + self.shortcut.bias

    def forward(self, pending: Pending, stream: Stream) -> Pending:
        """Finish `pending`, run both convolutions; the skip connection rides along."""
        x, skip = stream.feed(pending, self.conv1, self.scale1, keep=True)
        x, _ = stream.feed(self.conv1.pending(x), self.conv2, self.scale2, keep=False)
        if self.shortcut is not None:
            skip = F.linear(skip, self.shortcut.last[:, :, 0, 0])
        return self.conv2.pending(x, skip)


class FastAttention(nn.Module):
    """Single-head self-attention within each frame. The scores' 1/sqrt(C) is folded into the query's weights.

    Attributes:
        around: from the normalised map of the pixels that ask to that of those that are attended to. The same ones;
            hooks on it make it more.
    """

    scale: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor

    def __init__(self, block: AttentionBlock, dtype: torch.dtype, frames: int) -> None:
        super().__init__()
        self.around = nn.Identity()
        self.register_buffer("scale", _scale_of(block.norm))
        channels = block.proj.out_channels
        fold = torch.ones(3 * channels, 1, device=block.proj.weight.device)
        fold[:channels] = channels**-0.5
        self.register_buffer("qkv", (block.to_qkv.weight.detach().float().flatten(1) * fold).to(dtype))
        self.register_buffer("qkv_bias", (_bias_of(block.to_qkv).float() * fold[:, 0]).to(dtype))
        self.register_buffer("proj", block.proj.weight.detach().flatten(1).to(dtype))
        self.register_buffer("proj_bias", _bias_of(block.proj).to(dtype))

    def forward(self, pending: Pending, stream: Stream) -> Pending:
        """Attend within each frame; needs no history."""
        normed, total = pending.finish(self.scale, silu=False)
        mixed = _attend(*self._queries_keys_values(normed, self.around(normed)))
        return Pending(F.linear(mixed, self.proj, self.proj_bias).view_as(normed), residual=total)

    def _queries_keys_values(self, asking: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
        """Of [T, H, W, C] each: [T, H * W, C], by one product where the same pixels ask and are asked."""
        if asked is asking:
            return F.linear(asking.flatten(1, 2), self.qkv, self.qkv_bias).chunk(3, dim=-1)
        channels = asking.shape[-1]
        q = F.linear(asking.flatten(1, 2), self.qkv[:channels], self.qkv_bias[:channels])
        k, v = F.linear(asked.flatten(1, 2), self.qkv[channels:], self.qkv_bias[channels:]).chunk(2, dim=-1)
        return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of [T, P, C] and twice [T, Q, C] with fp32 scores.

    No fused kernel of cuDNN or FlashAttention takes a head of 384 channels, and PyTorch's memory-efficient one
    needs 0.19 ms for 2880 tokens on H200: three plain steps over a small map are several times faster.
    """
    if q.is_cuda and q.dtype != torch.float32:
        scores = torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
        return torch.bmm(softmax_rows(scores, v.dtype), v)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]


class FastUpsample(nn.Module):
    """Temporal doubling as a matrix product, then the folded nearest upsampling."""

    phases: Tensor
    bias: Tensor
    time: Tensor
    time_bias: Tensor

    def __init__(self, block: Upsample, dtype: torch.dtype, frames: int) -> None:
        super().__init__()
        conv: Any = block.resample["1"]
        self.register_buffer("phases", _channels_last(fold_nearest(conv.weight.detach()), dtype))
        self.register_buffer("bias", _bias_of(conv).float())
        self.time_conv = None if block.time_conv is None else FastConv(block.time_conv, dtype)
        if self.time_conv is not None:
            # [even or odd frame, 3C in, C out], so that both frames come out contiguous
            matrix = self.time_conv.steady[:, :, 0, 0].unflatten(0, (2, -1))
            self.register_buffer("time", matrix.transpose(1, 2).contiguous())
            self.register_buffer("time_bias", self.time_conv.bias.unflatten(0, (2, -1)).to(dtype))

    def forward(self, pending: Pending, stream: Stream) -> Pending:
        """[T, H, W, C] -> shuffled [2T, H + 1, W + 1, 2C] (T for a first frame)."""
        if self.time_conv is None or not stream.steady:
            x, _ = pending.finish()
            if self.time_conv is not None:
                stream.forget(self.time_conv, x)
        else:
            stacks, _ = stream.feed(pending, self.time_conv, None, keep=False)
            x = self._double_time(stacks)
        return Pending(conv2d_nhwc(x, self.phases), self.bias, shuffled=True)

    def _double_time(self, stacks: Tensor) -> Tensor:
        """[T, H, W, 3C] -> [2T, H, W, C]. Frame by frame: a product over all of them would copy its input twice."""
        frames, height, width, _ = stacks.shape
        rows = stacks.view(frames, height * width, -1)
        out = rows.new_empty(frames, 2, height * width, self.time.shape[-1])
        for t in range(frames):
            for parity in (0, 1):
                torch.addmm(self.time_bias[parity], rows[t], self.time[parity], out=out[t, parity])
        return out.view(2 * frames, height, width, -1)


def fold_nearest(weight: Tensor) -> Tensor:
    """Fold nearest upsampling by two into the 3x3 convolution behind it: [O, C, 3, 3] -> [4O, C, 2, 2].

    Output row 2i + a sees upsampled rows 2i + a - 1 .. 2i + a + 1, that is input rows i - 1, i, i (a = 0) or
    i, i, i + 1 (a = 1): two rows, the doubled one with the sum of two taps. Run with padding 1, output row r of
    the 2x2 convolution meets input rows r - 1 and r, so phase a of row i stands at r = i + a. Columns likewise.
    Channel (2a + b) * O + o is phase (a, b) of output o. Sums are taken in fp32 at least.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = [_fold_axis(wide, 2, a) for a in (0, 1)]
    return torch.cat([_fold_axis(row, 3, b) for row in rows for b in (0, 1)])


def _fold_axis(weight: Tensor, axis: int, phase: int) -> Tensor:
    first, middle, last = weight.unbind(axis)
    taps = (first, middle + last) if phase == 0 else (first + middle, last)
    return torch.stack(taps, axis)


class FastDownsample(nn.Module):
    """Stride-2 convolution, padded right and below; a lone frame is not halved in time.

    Its 3x3 kernel is given a first row and column of zeros: 4x4, padded on all sides, meets the same pixels, and the
    picture need not be copied into a larger one.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, block: Downsample, dtype: torch.dtype, frames: int) -> None:
        super().__init__()
        conv: Any = block.resample["1"]
        self.register_buffer("weight", _channels_last(F.pad(conv.weight.detach(), (1, 0, 1, 0)), dtype))
        self.register_buffer("bias", _bias_of(conv).float())

    def forward(self, pending: Pending, stream: Stream) -> Pending:
        """[1, H, W, C] -> [1, H/2, W/2, C]."""
        x, _ = pending.finish()
        return Pending(conv2d_nhwc(x, self.weight, padding=1, stride=2), self.bias)


FAST_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    ResidualBlock: FastResidual,
    AttentionBlock: FastAttention,
    Upsample: FastUpsample,
    Downsample: FastDownsample,
}


class FastHalf(nn.Module):
    """conv1, the blocks and the head of an encoder or decoder.

    `first` and `last` take the place of conv1 and of the head's convolution.
    """

    scale: Tensor

    def __init__(
        self,
        half: Encoder | Decoder,
        dtype: torch.dtype,
        *,
        first: CausalConv3d | None = None,
        last: CausalConv3d | None = None,
        pad_out: int = 0,
    ) -> None:
        super().__init__()
        head: Any = half.head
        first, last = first or half.conv1, last or head["2"]
        self.conv1 = FastConv(first, dtype)
        self.blocks, frames = nn.ModuleList(), 1
        for block in half.blocks():
            self.blocks.append(FAST_BLOCKS[type(block)](block, dtype, frames))
            if isinstance(block, Upsample) and block.time_conv is not None:
                frames *= 2
        self.register_buffer("scale", _scale_of(head["0"]))
        self.head = FastConv(last, dtype, frames, pad_out=pad_out)
        self.channels_out = last.out_channels

    def forward(self, x: Tensor, state: VaeState | None) -> Tensor:
        """[T, H, W, C] -> fp32 [T', H', W', O] with the head's bias added."""
        stream = Stream(state)
        x, _ = stream.feed(Pending(x), self.conv1, None, keep=False)
        pending = self.conv1.pending(x)
        for block in self.blocks:
            pending = block(pending, stream)
        x, _ = stream.feed(pending, self.head, self.scale, keep=False)
        out = self.channels_out
        return self.head(x)[..., :out] + self.head.bias[:out]  # fp32, as the bias


@torch.no_grad()
def fold_bias(conv: CausalConv3d) -> CausalConv3d:
    """The encoder's first convolution for a `FastVae.frame_buffer`: the ones, at the middle tap, weigh the bias.

    Added later, it would cost a pass over the encoder's largest map: the skip connection wants the sum.
    """
    weight = F.pad(conv.weight.float(), (0, 0) * 3 + (0, TENSOR_CORE_CHANNELS - COLOURS))
    weight[:, COLOURS, -1, 1, 1] = _bias_of(conv)
    return _convolution(weight, None, conv.path)


@torch.no_grad()
def fold_normalisation(vae: WanVae) -> CausalConv3d:
    """`(conv1(head(h)) - mean) / std` as one convolution, folded in fp32: to the mean, without the log-variance."""
    mean, std = vae.mean.flatten().float(), vae.std.flatten().float()
    z, head = vae.config.z_dim, cast(CausalConv3d, vae.encoder.head["2"])
    matrix = vae.conv1.weight.float().flatten(1)[:z] / std[:, None]
    bias = matrix @ _bias_of(head).float() + (_bias_of(vae.conv1).float()[:z] - mean) / std
    return _convolution(torch.einsum("zo,octhw->zcthw", matrix, head.weight.float()), bias, head.path)


def _convolution(weight: Tensor, bias: Tensor | None, path: str) -> CausalConv3d:
    with torch.device("meta"):  # initialises nothing, draws no random numbers
        conv = CausalConv3d(weight.shape[1], weight.shape[0], (3, 3, 3))
    conv.weight = nn.Parameter(weight)
    conv.bias = None if bias is None else nn.Parameter(bias)
    conv.path = path
    return conv


class FastVae(nn.Module):
    """Drop-in for `WanVae.decode` and `WanVae.encode_frame`, batch 1, with weights repacked once.

    Args:
        vae: the plain module; its weights are copied, in the widest precision it holds.
        dtype: of the decoder. bf16 decoding is as good as fp16.
        encode_dtype: of the lone-frame encoder. bf16 is refused: inside a causal rollout it costs quality
            (FastVideo issue 1472: SSIM 0.98 to 0.76).
    """

    to_raw: Tensor
    raw_bias: Tensor

    def __init__(self, vae: WanVae, *, dtype: torch.dtype, encode_dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        if encode_dtype == torch.bfloat16:
            raise ValueError(
                "encode_dtype: got bfloat16, expected float16 or wider: bf16 anchors lose quality"
            )
        self.config = vae.config
        self.dtype = dtype
        self.encode_dtype = encode_dtype
        self.decoder = FastHalf(vae.decoder, dtype, pad_out=TENSOR_CORE_CHANNELS - COLOURS)
        # With 8 channels the first convolution is cuDNN's: 53 us at 576x320 (H100, fp16). A form of wanrt's own kernel
        # for them took 80 us in its best tile, and 131 in the other.
        first, last = fold_bias(vae.encoder.conv1), fold_normalisation(vae)
        self.encoder = FastHalf(vae.encoder, encode_dtype, first=first, last=last)
        self._fold_entry(vae)

    def _fold_entry(self, vae: WanVae) -> None:
        """`conv2((z * std) + mean)` as one matrix, in fp32."""
        mean, std = vae.mean.flatten().float(), vae.std.flatten().float()
        conv2 = vae.conv2.weight.detach().float().flatten(1)
        self.register_buffer("to_raw", conv2 * std)
        self.register_buffer("raw_bias", conv2 @ mean + _bias_of(vae.conv2).float())

    @property
    def why_cudnn(self) -> str | None:
        """Why cuDNN convolves in the decoder's residual blocks, most of a decode; None: wanrt's own kernel does."""
        blocks = [block for block in self.decoder.blocks if isinstance(block, FastResidual)]
        reasons = (conv.why_cudnn for block in blocks for conv in (block.conv1, block.conv2))
        return next((reason for reason in reasons if reason is not None), None)

    def decoder_state(self) -> VaeState:
        """A fresh state for one stream of `decode`; `WanVae.decode` can continue it and the other way round."""
        return VaeState("decoder")

    @torch.no_grad()
    def decode(self, latents: Tensor, state: VaeState) -> Tensor:
        """As `WanVae.decode` for [1, z_dim, T, h, w]: fp32 pixels [1, 3, 4T, H, W] in [-1, 1].

        Raises `ValueError` for another batch size, an encoder's state, or a size that changes in the stream.
        """
        if latents.shape[0] != 1:
            raise ValueError(f"got a batch of {latents.shape[0]}, expected 1: decode streams one by one")
        pieces = []
        for latent in latents.split(1, dim=2):  # one matrix shape whatever the cut: bit-identical streams
            raw = F.linear(latent[0].permute(1, 2, 3, 0).float(), self.to_raw, self.raw_bias).to(self.dtype)
            state.check("decoder", raw.permute(3, 0, 1, 2)[None])
            pieces.append(self.decoder(raw, state).clamp_(-1.0, 1.0))
            state.started = True
        pixels = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return pixels.permute(3, 0, 1, 2)[None]

    @torch.no_grad()
    def encode_frame(self, pixels: Tensor) -> Tensor:
        """As `WanVae.encode_frame` for [1, 3, 1, H, W]: normalised fp32 mean [1, z_dim, 1, h, w].

        Raises `ValueError` for another shape.
        """
        if pixels.shape[:3] != (1, 3, 1):
            raise ValueError(f"got pixels of shape {list(pixels.shape)}, expected [1, 3, 1, H, W]: one frame")
        buffer, inside = self.frame_buffer(*pixels.shape[3:])
        inside.copy_(pixels)
        return self.encode_buffer(buffer)

    def frame_buffer(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Memory for one frame as the encoder reads it, and the pixels in it, [1, 3, 1, H, W].

        That is [1, H, W, 8]: three colours, ones for `fold_bias`, zeros.
        """
        buffer = self.to_raw.new_zeros(1, height, width, TENSOR_CORE_CHANNELS, dtype=self.encode_dtype)
        buffer[..., COLOURS] = 1
        return buffer, buffer[..., :COLOURS].permute(3, 0, 1, 2)[None]

    @torch.no_grad()
    def encode_buffer(self, buffer: Tensor) -> Tensor:
        """As `encode_frame` for a frame whose pixels were copied into a `frame_buffer`."""
        return self.encoder(buffer, None).permute(3, 0, 1, 2)[None]
