"""A start for training a Wan VAE from nothing: close to an identity that averages space and time.

PyTorch's default start hardly trains here: every norm forgets the absolute intensity and nothing skips
around the resamplers. Instead, seven channels are wired by hand through the whole network and the rest
start as usual:

    0, 1, 2   the picture (encoder) or the first three latent channels (decoder)
    3, 4, 5   their negatives: silu(x) - silu(-x) = x, so a pair passes through SiLU unharmed
    6         a constant, against which the norms keep the absolute intensity
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanrt.models.vae import AttentionBlock, Downsample, ResidualBlock, Upsample, WanVae

WIRED = 7
"""Channels wired by hand."""

LEVEL = 1.5
"""Value of the constant channel; pictures are in -1..1."""

RESIDUAL = 0.2
"""Scale of the last convolution of every residual branch, against PyTorch's default."""


Conv = nn.Conv2d | nn.Conv3d


def _conv(module: object) -> Conv:
    """`module`, known to be a convolution."""
    assert isinstance(module, Conv)
    return module


def _bias(conv: Conv) -> Tensor:
    """The bias, known to be there."""
    assert conv.bias is not None
    return conv.bias


def _pass(conv: Conv, kernel: Tensor, rows: int = 0) -> None:
    """Output `rows` + i = input i through `kernel`, for the wired channels; no bias on any channel."""
    _bias(conv).zero_()
    for i in range(WIRED):
        conv.weight[rows + i] = 0
        conv.weight[rows + i, i] = kernel


def _centre(conv: Conv) -> Tensor:
    """A kernel that picks the present frame and pixel (the last time tap, the middle in space)."""
    kernel = torch.zeros_like(conv.weight[0, 0])
    index = [n // 2 for n in kernel.shape]
    if kernel.ndim == 3:
        index[0] = kernel.shape[0] - 1
    kernel[tuple(index)] = 1
    return kernel


def _enter(conv: Conv) -> None:
    """First convolution of a half: channels 0..2, their negatives, the constant."""
    conv.weight[:WIRED] = 0
    _bias(conv).zero_()
    centre = _centre(conv)
    for i in range(3):
        conv.weight[i, i], conv.weight[3 + i, i] = centre, -centre
    _bias(conv)[6] = LEVEL


def _leave(conv: Conv) -> None:
    """Last convolution of a half: output i = pair i, through the SiLU before it."""
    conv.weight[:3] = 0
    _bias(conv).zero_()
    centre = _centre(conv)
    for i in range(3):
        conv.weight[i, i], conv.weight[i, 3 + i] = centre, -centre


def _shrink(conv: Conv) -> None:
    """The end of a residual branch: small, without a bias."""
    conv.weight.mul_(RESIDUAL)
    _bias(conv).zero_()


def _average(conv: Conv) -> Tensor:
    """A kernel that averages the 2x2 pixels, or the two newest frames, that stride 2 stands for."""
    kernel = torch.zeros_like(conv.weight[0, 0])
    if kernel.ndim == 2:
        kernel[:2, :2] = 0.25
    else:
        kernel[1:] = 0.5
    return kernel


def _block(module: nn.Module) -> None:
    if isinstance(module, ResidualBlock):
        _shrink(_conv(module.residual["6"]))
        if isinstance(module.shortcut, nn.Conv3d):
            _pass(module.shortcut, _centre(module.shortcut))
    elif isinstance(module, AttentionBlock):
        _shrink(_conv(module.proj))
    elif isinstance(module, Downsample):
        conv = _conv(module.resample["1"])
        _pass(conv, _average(conv))
        if module.time_conv is not None:
            _pass(module.time_conv, _average(module.time_conv))
    elif isinstance(module, Upsample):
        conv = _conv(module.resample["1"])
        _pass(conv, _centre(conv))
        if module.time_conv is not None:
            for rows in (0, module.time_conv.weight.shape[0] // 2):
                _pass(module.time_conv, _centre(module.time_conv), rows)


def _identity(conv: Conv) -> None:
    conv.weight.zero_()
    _bias(conv).zero_()
    for i in range(conv.weight.shape[0]):
        conv.weight[i, i] = 1


@torch.no_grad()
def near_identity_(vae: WanVae, pixels: Tensor) -> None:
    """Wire `vae` (PyTorch's default weights) and scale its two ends on `pixels` `[B, 3, 1 + 4k, H, W]`.

    Afterwards every latent channel has mean 0 and standard deviation 1 on `pixels`, and the decoder's
    output has the scale of the pixels. `latents_mean` and `latents_std` of the config must be 0 and 1.
    """
    z = vae.config.z_dim
    for module in vae.modules():
        _block(module)
    for half in (vae.encoder, vae.decoder):
        _enter(half.conv1)
        _leave(_conv(half.head["2"]))
    _identity(vae.conv1)
    _identity(vae.conv2)
    _even_latents(vae, pixels, z)
    _fit_output(vae, pixels)


def _even_latents(vae: WanVae, pixels: Tensor, z: int) -> None:
    """Scale and shift the encoder's head so that the means are standardised; log-variance -4 everywhere."""
    head = _conv(vae.encoder.head["2"])
    head.weight[z:] = 0
    _bias(head)[z:] = -4.0
    mean, _ = vae.encode_train(pixels)
    over = (0, 2, 3, 4)
    scale = 1 / mean.std(over).clamp(min=1e-4)
    head.weight[:z] *= scale.view(-1, 1, 1, 1, 1)
    _bias(head)[:z] = -mean.mean(over) * scale


def _fit_output(vae: WanVae, pixels: Tensor) -> None:
    """Scale and shift the decoder's three outputs by least squares against the pixels."""
    mean, _ = vae.encode_train(pixels)
    out = vae.decode_train(mean)
    head = _conv(vae.decoder.head["2"])
    for i in range(3):
        x, y = out[:, i].flatten(), pixels[:, i].flatten()
        slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var().clamp(min=1e-6)
        head.weight[i] *= slope
        _bias(head)[i] = y.mean() - slope * x.mean()
