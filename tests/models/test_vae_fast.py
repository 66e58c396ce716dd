"""The repacked VAE against the plain module: same pixels, same latents, same state."""

import pytest
import torch

from wanrt.models.vae import VaeConfig, WanVae
from wanrt.models.vae_fast import FastVae, Pending, fold_nearest
from wanrt_kernels.conv_window import conv_window_ref, forms

# of the output's scale; both sides round at other places, so half precisions are held to their own noise below
FP32 = 2e-5
CONFIGS = [
    VaeConfig(base_dim=16),
    VaeConfig(base_dim=8, num_res_blocks=1),
    VaeConfig(base_dim=24, dim_mult=(1, 2, 4), temporal_downsample=(True, False)),
]


def random_vae(config, device="cpu"):
    torch.manual_seed(0)
    vae = WanVae(config).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return vae.to(device)


def error(got, want):
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def run_decode(vae, latents, state):
    return torch.cat([vae.decode(latents[:, :, i : i + 1], state) for i in range(latents.shape[2])], dim=2)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.base_dim}x{c.dim_mult}")
def test_decode_and_state_equal_the_plain_module(config):
    vae = random_vae(config)
    fast = FastVae(vae, dtype=torch.float32, encode_dtype=torch.float32)
    latents = torch.randn(1, config.z_dim, 4, 3, 5)
    plain_state, fast_state = vae.decoder_state(), fast.decoder_state()
    want = run_decode(vae, latents, plain_state)
    got = run_decode(fast, latents, fast_state)
    assert got.shape == want.shape
    assert error(got, want) <= FP32
    assert fast_state.slots.keys() == plain_state.slots.keys()
    assert fast_state.nbytes == plain_state.nbytes
    for path, slot in plain_state.slots.items():
        assert error(fast_state.slots[path], slot) <= FP32, path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.base_dim}x{c.dim_mult}")
def test_encode_frame_equals_the_plain_module(config):
    vae = random_vae(config)
    fast = FastVae(vae, dtype=torch.float32, encode_dtype=torch.float32)
    factor = 2 ** (len(config.dim_mult) - 1)
    pixels = torch.rand(1, 3, 1, 6 * 8, 4 * factor * 2) * 2 - 1
    assert error(fast.encode_frame(pixels), vae.encode_frame(pixels)) <= FP32


@pytest.fixture
def by_kernel(monkeypatch):
    """wanrt's convolution kernel on any device and precision, as its reference; the sizes it was called with."""
    from wanrt.models import vae_fast

    called = []

    def convolve(window, weight, rows, *, bias, residual):
        called.append((window.shape[-1], weight.shape[0]))
        return conv_window_ref(window, weight, rows, bias=bias, residual=residual)

    def why_not(device, channels, outputs, dtype):
        return None if forms(channels, outputs, "f16") else "no form"

    monkeypatch.setattr(vae_fast, "conv_window", convolve)
    monkeypatch.setattr(vae_fast, "why_not", why_not)
    return called


WIDE = VaeConfig(base_dim=96, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))


def test_the_kernel_convolves_and_adds_all_but_the_ends(by_kernel):
    vae = random_vae(WIDE)
    fast = FastVae(vae, dtype=torch.float32, encode_dtype=torch.float32)
    pixels = torch.rand(1, 3, 1, 16, 24) * 2 - 1
    assert error(fast.encode_frame(pixels), vae.encode_frame(pixels)) <= FP32
    middle = [(192, 192)] * 4
    assert by_kernel == [(96, 96), (96, 96), (96, 192), (192, 192), *middle]
    by_kernel.clear()
    latents = torch.randn(1, WIDE.z_dim, 3, 2, 3)
    want = run_decode(vae, latents, vae.decoder_state())
    assert error(run_decode(fast, latents, fast.decoder_state()), want) <= FP32
    assert (192, 192) in by_kernel
    assert (96, 96) in by_kernel


def test_the_kernel_leaves_nothing_to_a_pass_of_its_own(by_kernel, monkeypatch):
    """A lone frame's passes over memory: a norm before each of a block's convolutions, attention and the head."""
    from wanrt.models import vae_fast

    passes = []
    norm_stack = vae_fast.norm_stack

    def counted(x, scale, **options):
        passes.append((scale is not None, options["keep_total"]))
        return norm_stack(x, scale, **options)

    fast = FastVae(random_vae(WIDE), dtype=torch.float32, encode_dtype=torch.float32)
    monkeypatch.setattr(vae_fast, "norm_stack", counted)
    fast.encode_frame(torch.rand(1, 3, 1, 16, 24))
    assert [normed for normed, _ in passes] == [True] * (2 * 4 + 1 + 1)
    assert sum(kept for _, kept in passes) == 2, "behind cuDNN's downsampling and behind attention"


def test_nothing_to_finish_launches_nothing(monkeypatch):
    from wanrt.models import vae_fast

    monkeypatch.setattr(vae_fast, "norm_stack", None)
    x = torch.randn(1, 2, 3, 4)
    assert all(result is x for result in Pending(x).finish())
    y, total = Pending(x).finish(keep=False)
    assert y is x
    assert total is None


@pytest.mark.parametrize("work", ["bias", "residual", "scale", "state", "shuffled"])
def test_anything_to_finish_is_done(work):
    x = torch.randn(1, 2, 2, 4)
    more = {"bias": torch.ones(4), "residual": torch.ones_like(x), "shuffled": True}
    late = {"scale": torch.ones(4), "state": torch.ones(2, 2, 2, 4)}
    y, _ = Pending(x, **{k: v for k, v in more.items() if k == work}).finish(
        **{k: v for k, v in late.items() if k == work}
    )
    assert y.shape != x.shape or not torch.equal(y, x)


def test_pixels_are_padded_with_ones_and_zeros_in_the_encoder_s_dtype():
    fast = FastVae(random_vae(CONFIGS[1]), dtype=torch.float32)
    pixels = torch.rand(1, 3, 1, 16, 24) * 2 - 1
    seen = []
    fast.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    fast.encode_frame(pixels)
    (x,) = seen
    assert x.dtype == torch.float16
    assert x.is_contiguous()
    assert torch.equal(x[..., :3], pixels[0].permute(1, 2, 3, 0).half())
    assert x.shape == (1, 16, 24, 8)
    assert (x[..., 3] == 1).all()
    assert not x[..., 4:].any()


def test_a_stream_may_change_from_plain_to_fast_and_back():
    vae = random_vae(CONFIGS[0])
    fast = FastVae(vae, dtype=torch.float32)
    latents = torch.randn(1, 16, 6, 2, 3)
    want = run_decode(vae, latents, vae.decoder_state())
    state = vae.decoder_state()
    got = [run_decode(part, latents[:, :, i : i + 2], state) for i, part in ((0, vae), (2, fast), (4, vae))]
    assert error(torch.cat(got, dim=2), want) <= FP32


def test_two_streams_share_weights_and_any_cut_is_bit_identical():
    fast = FastVae(random_vae(CONFIGS[1]), dtype=torch.float32)
    first, second = torch.randn(2, 1, 16, 5, 2, 2)
    alone = [run_decode(fast, x, fast.decoder_state()) for x in (first, second)]
    states = fast.decoder_state(), fast.decoder_state()
    mixed = [[], []]
    for i in range(5):
        for stream, x in enumerate((first, second)):
            mixed[stream].append(fast.decode(x[:, :, i : i + 1], states[stream]))
    for got, want in zip(mixed, alone, strict=True):
        assert torch.equal(torch.cat(got, dim=2), want)
    state = fast.decoder_state()
    cut = torch.cat([fast.decode(first[:, :, :2], state), fast.decode(first[:, :, 2:], state)], dim=2)
    assert torch.equal(cut, alone[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_plain_module(dtype):
    vae = random_vae(CONFIGS[0])
    latents, pixels = torch.randn(1, 16, 3, 4, 4), torch.rand(1, 3, 1, 32, 32) * 2 - 1
    want = run_decode(vae, latents, vae.decoder_state())
    anchor = vae.encode_frame(pixels)
    fast = FastVae(vae, dtype=dtype)
    plain = random_vae(CONFIGS[0]).to(dtype)
    ours = relative(run_decode(fast, latents, fast.decoder_state()), want)
    theirs = relative(run_decode(plain, latents, plain.decoder_state()), want)
    assert ours <= 1.2 * theirs
    if dtype == torch.float16:
        assert relative(fast.encode_frame(pixels), anchor) <= 1.2 * relative(
            plain.encode_frame(pixels), anchor
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_size_on_the_gpu_is_no_worse_than_the_plain_module(dtype):
    vae = random_vae(VaeConfig(), "cuda")
    latents = torch.randn(1, 16, 4, 20, 36, device="cuda")
    pixels = torch.rand(1, 3, 1, 160, 288, device="cuda") * 2 - 1
    torch.backends.cudnn.allow_tf32 = False
    want = run_decode(vae, latents, vae.decoder_state())
    anchor = vae.encode_frame(pixels)
    fast = FastVae(vae, dtype=dtype)
    plain = random_vae(VaeConfig(), "cuda").to(dtype)
    ours = relative(run_decode(fast, latents, fast.decoder_state()), want)
    theirs = relative(run_decode(plain, latents, plain.decoder_state()), want)
    assert ours <= 1.2 * theirs
    if dtype == torch.float16:
        assert relative(fast.encode_frame(pixels), anchor) <= 1.2 * relative(
            plain.encode_frame(pixels), anchor
        )


def test_only_a_large_vae_without_the_own_kernel_races():
    from wanrt.models.vae_graph import races

    fast = FastVae(random_vae(CONFIGS[0]), dtype=torch.float16)
    assert "not a CUDA device" in fast.why_cudnn
    assert not races(fast), "wan-tiny's size"
    large = FastVae(
        WanVae(VaeConfig(base_dim=96, dim_mult=(1,), num_res_blocks=1, temporal_downsample=())),
        dtype=torch.float16,
    )
    assert races(large)


@pytest.mark.parametrize("missing", [None, (192, 192)])
def test_nothing_races_where_the_own_kernel_convolves_all(monkeypatch, missing):
    from wanrt.models import vae_fast
    from wanrt.models.vae_graph import races

    def why_not(device, channels, outputs, dtype):
        return "no form" if (channels, outputs) == missing else None

    monkeypatch.setattr(vae_fast, "why_not", why_not)
    config = VaeConfig(base_dim=96, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(False,))
    fast = FastVae(WanVae(config), dtype=torch.float16)
    assert fast.why_cudnn == (missing and "no form")
    assert races(fast) == (missing is not None)


def test_fold_nearest_is_exact_in_fp64():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    want = torch.nn.functional.conv2d(upsampled, weight, padding=1)
    phases = torch.nn.functional.conv2d(x, fold_nearest(weight), padding=1).unflatten(1, (4, 5))
    for a in (0, 1):
        for b in (0, 1):
            got = phases[:, 2 * a + b, :, a : a + 4, b : b + 6]
            torch.testing.assert_close(got, want[:, :, a::2, b::2], rtol=0, atol=1e-12)


def test_bf16_anchors_are_refused():
    with pytest.raises(ValueError, match="bf16 anchors lose quality"):
        FastVae(random_vae(CONFIGS[1]), dtype=torch.bfloat16, encode_dtype=torch.bfloat16)


@pytest.mark.gpu
def test_graphs_replay_the_fast_path_bit_for_bit():
    from wanrt.models.vae_graph import GraphedVae, convolutions

    fast = FastVae(random_vae(CONFIGS[0], "cuda"), dtype=torch.bfloat16).cuda()
    graphed = GraphedVae(fast, width=96, height=64)
    pixels = torch.rand(1, 3, 1, 64, 96, device="cuda") * 2 - 1
    with convolutions(fast):
        for _ in range(2):  # a second stream after reset() forgets the first
            latents = torch.randn(1, 16, 5, 8, 12, device="cuda")
            want = run_decode(fast, latents, fast.decoder_state())
            got = run_decode(graphed, latents, graphed.decoder_state())
            assert torch.equal(got, want)
        assert torch.equal(graphed.encode_frame(pixels), fast.encode_frame(pixels))
    with pytest.raises(ValueError, match="foreign VaeState"):
        graphed.decode(latents, fast.decoder_state())
