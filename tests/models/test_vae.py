"""The streaming Wan VAE against diffusers, against itself cut otherwise, and its refusals."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wanrt.models.vae import VaeConfig, VaeState, WanVae

# Relative to the largest reference value. fp32: rounding of some 40 layers in another order of summation.
SCALE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}


def randomise(module: nn.Module, seed: int) -> None:
    """Weights that keep activations near unit scale, biases and gains that matter."""
    gen = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float32)
        if name.endswith("gamma"):
            p.data.copy_(1 + 0.1 * noise)
        elif p.ndim == 1:
            p.data.copy_(0.1 * noise)
        else:
            p.data.copy_(noise / p[0].numel() ** 0.5)


def make_vae(base_dim: int = 8, dtype: torch.dtype = torch.float32, **kwargs: object) -> WanVae:
    vae = WanVae(VaeConfig(base_dim=base_dim, **kwargs)).eval()
    randomise(vae, seed=3)
    return vae.to(dtype)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = ((got.double() - want.double()).abs().max() / want.abs().max()).item()
    assert error <= tolerance


def decode_all(vae: WanVae, latents: Tensor, cuts: list[int], state: VaeState | None = None) -> Tensor:
    state = state or vae.decoder_state()
    return torch.cat([vae.decode(piece, state) for piece in latents.split(cuts, dim=2)], dim=2)


def encode_all(vae: WanVae, pixels: Tensor, cuts: list[int], state: VaeState | None = None) -> Tensor:
    state = state or vae.encoder_state()
    return torch.cat([vae.encode(piece, state) for piece in pixels.split(cuts, dim=2)], dim=2)


# --- names and shapes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, list[int]]:
    return json.loads((Path(__file__).parent / "data" / "wan2.1-vae.json").read_text())


def test_names_and_shapes_are_those_of_the_public_checkpoint(golden: dict[str, list[int]]) -> None:
    with torch.device("meta"):
        vae = WanVae(VaeConfig())
    assert {name: list(t.shape) for name, t in vae.state_dict().items()} == golden


@pytest.mark.parametrize(
    "config",
    [
        VaeConfig(),
        VaeConfig(base_dim=24),
        VaeConfig(base_dim=8, num_res_blocks=1, dim_mult=(1, 2, 2), temporal_downsample=(True, False)),
    ],
)
def test_config_comes_back_from_shapes(config: VaeConfig) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanVae(config).state_dict().items()}
    assert VaeConfig.from_shapes(shapes) == config


def test_lightvae_is_a_quarter_of_every_width(golden: dict[str, list[int]]) -> None:
    with torch.device("meta"):
        light = WanVae(VaeConfig(base_dim=24)).state_dict()
    kept = {3, 16, 32}  # picture and latent channels are not pruned
    for name, shape in golden.items():
        full = shape[:2] if name.endswith("weight") else shape[:1]
        assert list(light[name].shape[: len(full)]) == [n if n in kept else n // 4 for n in full], name


def test_config_refuses_statistics_of_another_width() -> None:
    with pytest.raises(ValueError, match="latents_mean has 16 values"):
        VaeConfig(z_dim=8)


# --- against diffusers ------------------------------------------------------------------------------------


def diffusers_twin(vae: WanVae) -> nn.Module:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    config = vae.config
    twin = AutoencoderKLWan(base_dim=config.base_dim, num_res_blocks=config.num_res_blocks).eval()
    twin.load_state_dict(convert_wan_vae_to_diffusers(dict(vae.state_dict())))
    return twin.to(vae.conv2.weight.dtype)


@torch.no_grad()
def test_decode_agrees_with_diffusers() -> None:
    """In fp32 only: diffusers' up-sampler rounds to fp32 whatever the dtype."""
    vae = make_vae()
    latents = noise(2, 16, 4, 4, 6)
    want = diffusers_twin(vae).decode(latents * vae.std + vae.mean).sample
    assert_close(decode_all(vae, latents, [1] * 4), want, SCALE_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_encode_agrees_with_diffusers(dtype: torch.dtype) -> None:
    vae = make_vae(dtype=dtype)
    pixels = picture(2, 3, 13, 32, 48, dtype=dtype)
    moments = diffusers_twin(vae).encode(pixels).latent_dist
    want = (moments.mean - vae.mean) / vae.std
    assert_close(encode_all(vae, pixels, [1, 4, 4, 4]), want, SCALE_TOLERANCE[dtype])
    mean, logvar = vae.encode_train(pixels)
    assert_close(mean, want, SCALE_TOLERANCE[dtype])
    assert_close(logvar, moments.logvar - 2 * vae.std.log(), SCALE_TOLERANCE[dtype])


# --- streaming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decode_is_bit_identical_however_the_stream_is_cut(dtype: torch.dtype) -> None:
    vae = make_vae(dtype=dtype)
    latents = noise(1, 16, 5, 3, 4)
    whole = decode_all(vae, latents, [5])
    assert whole.shape == (1, 3, 17, 24, 32)
    assert whole.dtype == dtype
    for cuts in ([1, 1, 1, 1, 1], [2, 3], [1, 3, 1]):
        assert torch.equal(decode_all(vae, latents, cuts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encode_is_bit_identical_in_any_cut_of_whole_groups(dtype: torch.dtype) -> None:
    vae = make_vae(dtype=dtype)
    pixels = picture(1, 3, 13, 24, 32)
    whole = encode_all(vae, pixels, [13])
    assert whole.shape == (1, 16, 4, 3, 4)
    for cuts in ([1, 4, 4, 4], [5, 8], [1, 12]):
        assert torch.equal(encode_all(vae, pixels, cuts), whole)


def test_first_latent_gives_one_frame_and_later_ones_four() -> None:
    vae = make_vae()
    state = vae.decoder_state()
    assert [vae.decode(noise(1, 16, 1, 3, 4), state).shape[2] for _ in range(3)] == [1, 4, 4]


def test_two_streams_share_weights() -> None:
    vae = make_vae()
    clips = [noise(1, 16, 4, 3, 4, seed=seed) for seed in (1, 2)]
    states = [vae.decoder_state(), vae.decoder_state()]
    pieces: list[list[Tensor]] = [[], []]
    for step, stream in itertools.product(range(4), range(2)):
        pieces[stream].append(vae.decode(clips[stream][:, :, step : step + 1], states[stream]))
    for stream in range(2):
        assert torch.equal(torch.cat(pieces[stream], dim=2), decode_all(vae, clips[stream], [4]))


def test_two_encoder_streams_share_weights() -> None:
    vae = make_vae()
    clips = [picture(1, 3, 9, 24, 32, seed=seed) for seed in (1, 2)]
    states = [vae.encoder_state(), vae.encoder_state()]
    pieces: list[list[Tensor]] = [[], []]
    for (start, end), stream in itertools.product([(0, 1), (1, 5), (5, 9)], range(2)):
        pieces[stream].append(vae.encode(clips[stream][:, :, start:end], states[stream]))
    for stream in range(2):
        assert torch.equal(torch.cat(pieces[stream], dim=2), encode_all(vae, clips[stream], [9]))


def test_reset_starts_a_new_stream_at_the_same_addresses() -> None:
    vae = make_vae()
    latents = noise(1, 16, 3, 3, 4)
    state = vae.decoder_state()
    first = decode_all(vae, latents, [1, 1, 1], state)
    addresses = {path: slot.data_ptr() for path, slot in state.slots.items()}
    state.reset()
    assert torch.equal(decode_all(vae, latents, [1, 1, 1], state), first)
    assert addresses == {path: slot.data_ptr() for path, slot in state.slots.items()}


def test_state_is_keyed_by_module_path_and_survives_a_copy_of_both() -> None:
    vae = make_vae()
    latents = noise(1, 16, 3, 3, 4)
    state = vae.decoder_state()
    vae.decode(latents[:, :, :2], state)
    modules = dict(vae.named_modules())
    assert state.slots
    assert all(path in modules and path.startswith("decoder.") for path in state.slots)
    twin, twin_state = copy.deepcopy(vae), copy.deepcopy(state)
    assert torch.equal(vae.decode(latents[:, :, 2:], state), twin.decode(latents[:, :, 2:], twin_state))


def test_state_size_is_two_frames_per_temporal_convolution() -> None:
    """At 576x320 in bf16 the full decoder's state is the 831 MiB of the public code (issue figures)."""
    vae = make_vae()
    state = vae.decoder_state()
    decode_all(vae, noise(1, 16, 2, 3, 4), [1, 1], state)
    convs = {n: m for n, m in vae.decoder.named_modules(prefix="decoder") if getattr(m, "path", "")}
    temporal = {n for n, m in convs.items() if m.kernel_size[0] == 3}
    assert set(state.slots) == temporal
    assert all(slot.shape[2] == 2 for slot in state.slots.values())
    assert state.nbytes == sum(slot.numel() * 4 for slot in state.slots.values())


# --- the lone frame ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_encode_frame_is_the_first_latent_of_a_stream(dtype: torch.dtype) -> None:
    vae = make_vae(dtype=dtype)
    frame = picture(1, 3, 1, 24, 32)
    assert torch.equal(vae.encode_frame(frame), vae.encode(frame, vae.encoder_state()))


class ThreeTaps(nn.Module):
    """Oracle of the lone-frame path: a causal convolution in 3-D behind two frames of zeros."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, state: object = None) -> Tensor:
        past, space = self.conv.kernel_size[0] - 1, self.conv.kernel_size[-1] // 2
        padded = nn.functional.pad(x, (space, space, space, space, past, 0))
        return nn.functional.conv3d(padded, self.conv.weight, self.conv.bias)


def with_three_taps(vae: WanVae) -> WanVae:
    oracle = copy.deepcopy(vae)
    for parent in list(oracle.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv3d) and child.kernel_size == (3, 3, 3):
                parent.add_module(name, ThreeTaps(child))
    return oracle


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-14)])
def test_lone_frame_shortcut_equals_the_3d_path(dtype: torch.dtype, tolerance: float) -> None:
    """The dropped taps multiply zeros: what is left is another order of summation."""
    vae = make_vae(dtype=dtype)
    oracle = with_three_taps(vae)
    frame, latent = picture(1, 3, 1, 32, 48), noise(1, 16, 1, 4, 6)
    assert_close(vae.encode_frame(frame), oracle.encode_frame(frame), tolerance)
    assert_close(vae.decode(latent, vae.decoder_state()), oracle.decode_train(latent).clamp(-1, 1), tolerance)


# --- whole clips, for training ----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decode_train_agrees_with_streaming(frames: int) -> None:
    vae = make_vae()
    latents = noise(2, 16, frames, 3, 4)
    got = vae.decode_train(latents).clamp(-1, 1)
    assert_close(got, decode_all(vae, latents, [1] * frames), 1e-5)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encode_train_agrees_with_streaming(frames: int) -> None:
    vae = make_vae()
    pixels = picture(2, 3, frames, 24, 32)
    assert_close(vae.encode_train(pixels)[0], encode_all(vae, pixels, [1] + [4] * (frames // 4)), 1e-5)


def test_training_passes_are_differentiable_and_recompute_changes_nothing() -> None:
    vae = make_vae()
    pixels = picture(1, 3, 5, 16, 16)
    gradients = []
    for recompute in (False, True):
        vae.zero_grad()
        mean, logvar = vae.encode_train(pixels, recompute=recompute)
        loss = vae.decode_train(mean + (0.5 * logvar).exp(), recompute=recompute).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in vae.parameters()])
    assert all(g.abs().max() > 0 for g in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


# --- wrong use --------------------------------------------------------------------------------------------


def test_wrong_use_is_refused_with_got_and_expected() -> None:
    vae = make_vae()
    latent, frame = noise(1, 16, 1, 3, 4), picture(1, 3, 1, 24, 32)
    with pytest.raises(ValueError, match=r"got a state made for the encoder, expected .*decoder_state"):
        vae.decode(latent, vae.encoder_state())
    with pytest.raises(ValueError, match=r"got a state made for the decoder"):
        vae.encode(frame, vae.decoder_state())
    with pytest.raises(ValueError, match=r"got latents of shape \[1, 3, 1, 3, 4\], expected \[B, 16"):
        vae.decode(latent[:, :3], vae.decoder_state())
    with pytest.raises(ValueError, match=r"got 2 pixel frames, expected 1 \+ 4k"):
        vae.encode(frame.expand(-1, -1, 2, -1, -1), vae.encoder_state())
    with pytest.raises(ValueError, match=r"got 30x24 pixels, expected multiples of 8"):
        vae.encode_frame(frame[..., :30])
    with pytest.raises(ValueError, match=r"got 5 frames, expected 1"):
        vae.encode_frame(frame.expand(-1, -1, 5, -1, -1))


def test_a_stream_may_not_change_midway_but_may_after_reset() -> None:
    vae = make_vae()
    state = vae.decoder_state()
    vae.decode(noise(1, 16, 1, 3, 4), state)
    with pytest.raises(ValueError, match="stream changed"):
        vae.decode(noise(1, 16, 1, 4, 4), state)
    state.reset()
    assert vae.decode(noise(1, 16, 1, 4, 4), state).shape == (1, 3, 1, 32, 32)
    encoder = vae.encoder_state()
    vae.encode(picture(1, 3, 1, 24, 32), encoder)
    with pytest.raises(ValueError, match="got 1 pixel frames, expected 4k"):
        vae.encode(picture(1, 3, 1, 24, 32), encoder)


# --- dtypes and places ------------------------------------------------------------------------------------


def test_latent_statistics_are_never_rounded_below_fp32() -> None:
    vae = make_vae().bfloat16()
    assert vae.mean.dtype == torch.float32
    assert vae.mean.flatten().tolist() == pytest.approx(VaeConfig().latents_mean, abs=1e-7)
    with torch.device("meta"):
        empty = WanVae(VaeConfig(base_dim=8))
    empty.load_state_dict(make_vae().state_dict(), assign=True)
    frame = picture(1, 3, 1, 24, 32)
    assert torch.equal(empty.encode_frame(frame), make_vae().encode_frame(frame))


def test_channels_last_weights_change_no_value() -> None:
    vae = make_vae()
    frame = picture(1, 3, 1, 24, 32)
    plain = vae.encode_frame(frame)
    assert_close(vae.to_channels_last().encode_frame(frame), plain, 1e-5)
    assert vae.encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("half", ["decode", "encode"])
def test_traces_without_graph_breaks(half: str) -> None:
    """First call, steady calls and the lone frame; the traced module computes what the plain one does."""
    vae = make_vae(base_dim=4)
    torch.compiler.reset()
    if half == "decode":
        clip, cuts, run, state = noise(1, 16, 4, 2, 2), [1] * 4, vae.decode, vae.decoder_state()
    else:
        clip, cuts, run, state = picture(1, 3, 13, 16, 16), [1, 4, 4, 4], vae.encode, vae.encoder_state()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    got = torch.cat([compiled(piece, state) for piece in clip.split(cuts, dim=2)], dim=2)
    plain = decode_all(vae, clip, cuts) if half == "decode" else encode_all(vae, clip, cuts)
    assert torch.equal(got, plain)
    if half == "encode":
        frame = clip[:, :, :1]
        traced = torch.compile(vae.encode_frame, fullgraph=True, backend="eager")
        assert torch.equal(traced(frame), vae.encode_frame(frame))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_of_one_steady_decode_continues_the_stream() -> None:
    """State tensors stay where they are and are updated in place, so a graph can replay the steady call."""
    vae = make_vae(dtype=torch.float16).cuda().to_channels_last()
    latents = noise(1, 16, 6, 4, 6).half().cuda()
    want = decode_all(vae, latents, [1] * 6)
    state, entry = vae.decoder_state(), latents[:, :, :1].clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        decode_all(vae, latents, [1, 1, 1, 3], state)  # warm-up: allocates the slots
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exit_ = vae.decode(entry, state)
    state.reset()
    pieces = [vae.decode(latents[:, :, :1], state)]
    for step in range(1, 6):
        entry.copy_(latents[:, :, step : step + 1])
        graph.replay()
        pieces.append(exit_.clone())
    assert_close(torch.cat(pieces, dim=2), want, 2e-3)
