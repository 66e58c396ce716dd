"""CUDA graphs of the VAE's three calls: first latent, next latent, lone-frame encode.

A decode is some 120 small launches; replayed as a graph they cost the host one. Shapes and state addresses are
fixed, so each graph is captured once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from wanrt.models.cuda_graph import CapturedCall
from wanrt.models.vae import VaeState
from wanrt.models.vae_fast import FastVae

WARM_UP_CALLS = 3  # cuDNN picks its algorithms in the first, its workspaces settle in the second
RACE_FROM = 64  # base_dim; below it (wan-tiny 16, LightVAE 24) a decode is too small for algorithms to matter


def convolutions(vae: FastVae) -> AbstractContextManager[None]:
    """How cuDNN chooses its algorithms: by rule where little is left to it or the VAE is small, else by a race.

    By rule the same command gives the same bits twice. But for the 3-D convolutions of a decode the rule takes
    algorithms of half the speed (H100, cuDNN 9.19, fp16, 96 channels at 576x320: 1.47 against 0.69 ms). A race takes
    seconds before the first frame, and another algorithm may win in another process, and round otherwise.
    """
    cudnn = torch.backends.cudnn
    # `flags` switches cuDNN off unless told otherwise; limit 0 tries every algorithm, not the likeliest ten
    return cudnn.flags(
        enabled=True,
        benchmark=races(vae),
        benchmark_limit=0,
        deterministic=False,
        allow_tf32=cudnn.allow_tf32,
    )


def races(vae: FastVae) -> bool:
    """Whether `convolutions` lets cuDNN race."""
    return vae.why_cudnn is not None and vae.config.base_dim >= RACE_FROM


class GraphedCall:
    """One function of one static input tensor, captured after a warm-up.

    Args:
        function: reads its argument's memory; allocates only through PyTorch.
        static: the input's home; calls copy into it.
        vae: whose function it is.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], static: Tensor, vae: FastVae) -> None:
        self.static = static
        with convolutions(vae):
            self._call = CapturedCall(lambda: function(static), static.device, warm_up=WARM_UP_CALLS)

    def __call__(self, x: Tensor) -> Tensor:
        """Replay on `x`. The result is a copy: the next replay does not touch it."""
        self.static.copy_(x)
        return self._call.replay().clone()

    def close(self) -> None:
        """Gives the graph up, whoever still holds this object."""
        self._call.close()


class GraphedVae:
    """`FastVae` for one stream of one size, with its calls as CUDA graphs. Same methods, same results.

    The graphs hold the addresses of one state, the one `decoder_state` returns; another is refused.

    Args:
        vae: on a CUDA device.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """

    def __init__(self, vae: FastVae, *, width: int, height: int) -> None:
        self.vae = vae
        self.config = vae.config
        self._state = vae.decoder_state()
        device = vae.to_raw.device
        latent = torch.zeros(1, vae.config.z_dim, 1, height // 8, width // 8, device=device)
        buffer, pixels = vae.frame_buffer(height, width)  # calls copy straight into the encoder's layout
        self._captured: list[GraphedCall] = []
        try:
            with torch.cuda.device(device):
                self._first = self._capture(self._decode_as(started=False), latent)
                self._next = self._capture(self._decode_as(started=True), latent)
                self._encode = self._capture(lambda _: vae.encode_buffer(buffer), pixels)
        except BaseException:
            self.close()
            raise
        self._state.reset()

    def _capture(self, function: Callable[[Tensor], Tensor], static: Tensor) -> GraphedCall:
        self._captured.append(GraphedCall(function, static, self.vae))
        return self._captured[-1]

    def close(self) -> None:
        """Gives the graphs up. A split VAE's hold NCCL's communicator, which is not left before they are gone."""
        for call in self._captured:
            call.close()
        self._captured.clear()

    def _decode_as(self, *, started: bool) -> Callable[[Tensor], Tensor]:
        def decode(latent: Tensor) -> Tensor:
            self._state.started = started
            return self.vae.decode(latent, self._state)

        return decode

    def decoder_state(self) -> VaeState:
        """The state that the graphs update, reset: one stream at a time."""
        self._state.reset()
        return self._state

    def decode(self, latents: Tensor, state: VaeState) -> Tensor:
        """As `FastVae.decode`. Raises `ValueError` for a state that is not this object's own."""
        if state is not self._state:
            raise ValueError(
                "got a foreign VaeState, expected the one from decoder_state(): graphs hold addresses"
            )
        pieces = []
        for latent in latents.split(1, dim=2):
            pieces.append((self._next if state.started else self._first)(latent))
            state.started = True
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def encode_frame(self, pixels: Tensor) -> Tensor:
        """As `FastVae.encode_frame`."""
        return self._encode(pixels)
