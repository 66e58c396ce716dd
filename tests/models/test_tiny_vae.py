"""TAEHV against a naive oracle that walks the checkpoint's tensors frame by frame, and its streaming."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.models.tiny_vae import TinyVae, TinyVaeConfig
from wanrt.models.vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD

SMALL = TinyVaeConfig(encoder_width=8, decoder_widths=(16, 12, 8, 8))
# taehv.py at madebyollin/taehv 1f14a56: index of every block that has weights, and what it is.
ENCODER = ["c", "r", "p", "s", "m", "m", "m", "p", "s", "m", "m", "m", "p", "s", "m", "m", "m", "c"]
DECODER = [
    "t",
    "c",
    "r",
    "m",
    "m",
    "m",
    "u",
    "g",
    "c",
    "m",
    "m",
    "m",
    "u",
    "g",
    "c",
    "m",
    "m",
    "m",
    "u",
    "g",
    "c",
    "r",
    "c",
]


def make_tiny(config: TinyVaeConfig = SMALL, dtype: torch.dtype = torch.float32) -> TinyVae:
    vae = TinyVae(config).eval()
    gen = torch.Generator().manual_seed(5)
    for p in vae.parameters():
        fan = p[0].numel() if p.ndim > 1 else 100
        p.data.copy_(torch.randn(p.shape, generator=gen) / fan**0.5)
    return vae.to(dtype)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Oracle:
    """TAEHV over a list of [B, C, H, W] frames, block after block, straight from the named tensors."""

    def __init__(self, vae: TinyVae) -> None:
        self.tensors = vae.state_dict()

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        bias = self.tensors.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    def memory(self, name: str, frames: list[Tensor]) -> list[Tensor]:
        out, past = [], torch.zeros_like(frames[0])
        for x in frames:
            y = torch.relu(self.conv(f"{name}.conv.0", torch.cat([x, past], 1)))
            y = self.conv(f"{name}.conv.4", torch.relu(self.conv(f"{name}.conv.2", y)))
            out.append(torch.relu(y + x))
            past = x
        return out

    def pool(self, name: str, frames: list[Tensor]) -> list[Tensor]:
        weight = self.tensors[f"{name}.conv.weight"]
        stride = weight.shape[1] // weight.shape[0]
        groups = [frames[i : i + stride] for i in range(0, len(frames), stride)]
        return [self.conv(f"{name}.conv", torch.cat(group, 1)) for group in groups]

    def grow(self, name: str, frames: list[Tensor]) -> list[Tensor]:
        channels = frames[0].shape[1]
        return [part for x in frames for part in self.conv(f"{name}.conv", x).split(channels, 1)]

    def run(self, half: str, blocks: list[str], frames: list[Tensor]) -> list[Tensor]:
        for index, block in enumerate(blocks):
            name = f"{half}.{index}"
            if block in "mpg":
                frames = {"m": self.memory, "p": self.pool, "g": self.grow}[block](name, frames)
            elif block in "cs":
                frames = [self.conv(name, x, stride=2 if block == "s" else 1) for x in frames]
            elif block == "u":
                frames = [x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in frames]
            else:
                frames = [torch.tanh(x / 3) * 3 if block == "t" else torch.relu(x) for x in frames]
        return frames

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, 3, 4T - 3, H, W] in [-1, 1], as taehv's `decode_video`."""
        frames = self.run("decoder", DECODER, list(latents.unbind(2)))
        return torch.stack(frames, 2)[:, :, 3:].clamp(0, 1) * 2 - 1

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, 4T, H, W] -> [B, C, T, h, w], as taehv's `encode_video`."""
        return torch.stack(self.run("encoder", ENCODER, list((pixels / 2 + 0.5).unbind(2))), 2)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= tolerance


def stream(run: object, clip: Tensor, cuts: list[int], state: object) -> Tensor:
    return torch.cat([run(piece, state) for piece in clip.split(cuts, dim=2)], dim=2)


@torch.no_grad()
def test_decode_agrees_with_the_oracle() -> None:
    vae = make_tiny()
    latents = noise(2, 16, 3, 3, 4)
    want = Oracle(vae).decode(latents)
    assert_close(stream(vae.decode, latents, [1, 1, 1], vae.decoder_state()), want, 1e-5)
    assert_close(vae.decode_train(latents).clamp(-1, 1), want, 1e-5)


@torch.no_grad()
def test_encode_agrees_with_the_oracle_on_the_clip_with_its_first_frame_repeated() -> None:
    vae = make_tiny()
    pixels = picture(2, 3, 9, 24, 32)
    aligned = torch.cat([pixels[:, :, :1].expand(-1, -1, 3, -1, -1), pixels], dim=2)
    want = Oracle(vae).encode(aligned)
    assert_close(stream(vae.encode, pixels, [1, 4, 4], vae.encoder_state()), want, 1e-5)
    assert_close(vae.encode_frame(pixels[:, :, :1]), want[:, :, :1], 1e-5)
    assert_close(vae.encode_train(pixels)[0], want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_cut_gives_the_same_bits(dtype: torch.dtype) -> None:
    vae = make_tiny(dtype=dtype)
    latents, pixels = noise(1, 16, 4, 3, 4), picture(1, 3, 9, 24, 32)
    whole = stream(vae.decode, latents, [4], vae.decoder_state())
    for cuts in ([1, 1, 1, 1], [2, 2]):
        assert torch.equal(stream(vae.decode, latents, cuts, vae.decoder_state()), whole)
    encoded = stream(vae.encode, pixels, [9], vae.encoder_state())
    assert torch.equal(stream(vae.encode, pixels, [1, 4, 4], vae.encoder_state()), encoded)


def test_two_streams_share_weights_and_reset_keeps_addresses() -> None:
    vae = make_tiny()
    a, b = noise(1, 16, 3, 3, 4, seed=1), noise(1, 16, 3, 3, 4, seed=2)
    states = vae.decoder_state(), vae.decoder_state()
    pieces = [
        (vae.decode(a[:, :, i : i + 1], states[0]), vae.decode(b[:, :, i : i + 1], states[1]))
        for i in range(3)
    ]
    alone = stream(vae.decode, a, [3], vae.decoder_state())
    assert torch.equal(torch.cat([p[0] for p in pieces], 2), alone)
    addresses = [slot.data_ptr() for slot in states[1].slots.values()]
    states[1].reset()
    assert torch.equal(stream(vae.decode, a, [1, 2], states[1]), alone)
    assert addresses == [slot.data_ptr() for slot in states[1].slots.values()]


@pytest.mark.parametrize(
    "config",
    [
        TinyVaeConfig(),
        SMALL,
        TinyVaeConfig(latent_channels=48, patch_size=2, decoder_time_upscale=(False, True, True)),
        TinyVaeConfig(encoder_time_downscale=(True, True, True), decoder_time_upscale=(True, True, True)),
    ],
)
def test_config_comes_back_from_shapes(config: TinyVaeConfig) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in TinyVae(config).state_dict().items()}
    assert TinyVaeConfig.from_shapes(shapes) == config


def test_tensor_names_are_those_of_taehv() -> None:
    """Counts and corners of `taew2_1.pth`: 64-wide encoder, 256-wide decoder start, bias-free resamplers."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in TinyVae(TinyVaeConfig()).state_dict().items()}
    assert shapes["encoder.0.weight"] == (64, 3, 3, 3)
    assert shapes["encoder.2.conv.weight"] == (64, 128, 1, 1)
    assert shapes["encoder.17.weight"] == (16, 64, 3, 3)
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3)
    assert "decoder.8.bias" not in shapes
    assert len(shapes) == 128


@torch.no_grad()
def test_lighttae_takes_the_statistics_of_wan() -> None:
    vae = make_tiny()
    light = TinyVae(
        TinyVaeConfig(**{**vars(SMALL), "latents_mean": WAN_LATENTS_MEAN, "latents_std": WAN_LATENTS_STD})
    )
    light.load_state_dict(vae.state_dict())
    latents, frame = noise(1, 16, 1, 3, 4), picture(1, 3, 1, 24, 32)
    assert_close(
        light.decode(latents, light.decoder_state()),
        vae.decode(latents * light.std + light.mean, vae.decoder_state()),
        1e-5,
    )
    assert_close(light.encode_frame(frame), (vae.encode_frame(frame) - light.mean) / light.std, 1e-5)


def test_wrong_use_is_refused() -> None:
    vae = make_tiny()
    with pytest.raises(ValueError, match="expected one from decoder_state"):
        vae.decode(noise(1, 16, 1, 3, 4), vae.encoder_state())
    with pytest.raises(ValueError, match=r"got 3 pixel frames, expected 1 \+ 4k"):
        vae.encode(picture(1, 3, 3, 24, 32), vae.encoder_state())


def test_traces_without_graph_breaks() -> None:
    vae = make_tiny()
    torch.compiler.reset()
    latents, frame = noise(1, 16, 3, 2, 2), picture(1, 3, 1, 16, 16)
    decode = torch.compile(vae.decode, fullgraph=True, backend="eager")
    encode = torch.compile(vae.encode_frame, fullgraph=True, backend="eager")
    traced = stream(decode, latents, [1, 1, 1], vae.decoder_state())
    assert torch.equal(traced, stream(vae.decode, latents, [3], vae.decoder_state()))
    assert torch.equal(encode(frame), vae.encode_frame(frame))
