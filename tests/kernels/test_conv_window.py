"""The Hopper convolution: its forms and source here, its numbers on a GPU."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from wanrt_kernels import nvrtc
from wanrt_kernels.conv_window import (
    CHUNK,
    SHARED_BYTES,
    SLACK_BYTES,
    TILE_HEIGHT,
    TYPES,
    ConvConfig,
    choose,
    conv_window,
    conv_window_ref,
    forms,
    launch,
    unsupported,
    why_not,
)

SHAPES = [(96, 96), (192, 192), (192, 384), (384, 384), (384, 192)]  # of the Wan VAE's decoder


def draw(*shape, device="cpu", dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def packed(weight):
    """[O, C, T, 3, 3] as [O, 9 T C]."""
    return weight.permute(0, 2, 3, 4, 1).flatten(1)


def test_reference_is_a_causal_convolution():
    window, weight = draw(5, 6, 7, 8), draw(4, 8, 3, 3, 3)
    clip = window.permute(3, 0, 1, 2)[None]
    want = F.conv3d(F.pad(clip, (1, 1, 1, 1, 0, 0)), weight)[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(conv_window_ref(window, packed(weight)), want)
    torch.testing.assert_close(
        conv_window_ref(window[2:3], packed(weight[:, :, 2:])), want_first(window, weight)
    )


def want_first(window, weight):
    """What a frame without a past gives: only the last time tap meets anything."""
    frame = window[2:3].permute(0, 3, 1, 2)
    return F.conv2d(frame, weight[:, :, 2], padding=1).permute(0, 2, 3, 1)


def test_reference_computes_only_the_rows_asked_for():
    window, weight = draw(4, 6, 5, 8), draw(4, 27 * 8)
    whole, part = conv_window_ref(window, weight), conv_window_ref(window, weight, (1, 5))
    assert torch.equal(part[:, 1:5], whole[:, 1:5])
    assert not part[:, [0, 5]].any()


@pytest.mark.parametrize("rows", [(-1, 3), (0, 7), (3, 3)])
def test_rows_outside_the_picture_are_refused(rows):
    with pytest.raises(ValueError, match="expected at least one of rows 0 to 5"):
        conv_window(draw(3, 6, 4, 96), draw(96, 27 * 96), rows)


@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
def test_forms_fill_shared_memory_and_cover_the_channels(channels, outputs):
    found = forms(channels, outputs, "f16")
    assert len(found) == (2 if outputs % 192 else 4)
    for form in found:
        frames, weights = (form.tile_width + 2) * TILE_HEIGHT * CHUNK * 2, 3 * form.columns * CHUNK * 2
        assert form.stages >= 3
        assert form.stages * (frames + weights) + SLACK_BYTES <= SHARED_BYTES
        # the copy engine's swizzle repeats every 512 bytes: every box and every column begin with it
        assert frames % 512 == form.columns * CHUNK * 2 % 512 == TILE_HEIGHT * CHUNK * 2 % 512 == 0


def test_reference_adds_bias_and_residual():
    window, weight = draw(3, 4, 5, 8), draw(4, 27 * 8)
    bias, residual = draw(4), draw(1, 4, 5, 4)
    want = conv_window_ref(window, weight) + bias + residual
    assert torch.equal(conv_window_ref(window, weight, bias=bias, residual=residual), want)
    half = conv_window_ref(window.bfloat16(), weight.bfloat16(), bias=bias)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bias": torch.zeros(95)}, r"bias: got torch.float32 \(95,\)"),
        ({"bias": torch.zeros(96).half()}, "bias: got torch.float16"),
        ({"residual": torch.zeros(1, 4, 5, 96)}, r"expected contiguous torch.float16 \[1, 4, 5, 96\]"),
        ({"residual": torch.zeros(1, 5, 4, 96).half().transpose(1, 2)}, "residual: got"),
    ],
)
def test_what_does_not_fit_is_not_added(monkeypatch, more, message):
    from wanrt_kernels import conv_window as module

    monkeypatch.setattr(module, "unsupported", lambda *sizes: None)
    with pytest.raises(ValueError, match=message):
        conv_window(torch.zeros(3, 4, 5, 96).half(), torch.zeros(96, 27 * 96).half(), **more)


def test_other_sizes_have_no_form():
    assert forms(16, 16, "f16") == ()
    assert forms(96, 8, "f16") == ()
    assert "not a CUDA device" in why_not(torch.device("cpu"), 96, 96, torch.float16)
    with pytest.raises(ValueError, match="not a CUDA device; use conv_window_ref"):
        conv_window(draw(3, 4, 4, 96), draw(96, 27 * 96))


def test_it_is_on_unless_switched_off(monkeypatch):
    from wanrt_kernels import conv_window as module

    monkeypatch.setattr(module, "unsupported", lambda *sizes: None)
    about = (torch.device("cuda", 0), 96, 96, torch.float16)
    monkeypatch.delenv("WANRT_HOPPER_CONV", raising=False)
    assert why_not(*about) is None
    for value in ("", "1"):
        monkeypatch.setenv("WANRT_HOPPER_CONV", value)
        assert why_not(*about) is None
    monkeypatch.setenv("WANRT_HOPPER_CONV", "0")
    assert why_not(*about) == "wanrt's own kernel is switched off by WANRT_HOPPER_CONV=0"


def tile(form):
    return form.pixels, form.columns


# Milliseconds of every tile on an H100 (132 multiprocessors, PyTorch 2.11, fp16): channels, outputs, (frames, height,
# width), (pixels, outputs) of the tile.
MEASURED = [
    (96, 96, (4, 320, 576), {(256, 96): 0.644, (128, 96): 0.829}),
    (192, 192, (4, 160, 288), {(256, 192): 0.5985, (128, 192): 0.660, (256, 96): 0.567, (128, 96): 0.740}),
    (192, 384, (2, 80, 144), {(256, 192): 0.2331, (128, 192): 0.1994, (256, 96): 0.2325, (128, 96): 0.224}),
    (384, 384, (2, 80, 144), {(256, 192): 0.384, (128, 192): 0.339, (256, 96): 0.393, (128, 96): 0.470}),
    (384, 384, (1, 40, 72), {(256, 192): 0.203, (128, 192): 0.131, (256, 96): 0.128, (128, 96): 0.101}),
    (96, 96, (4, 480, 832), {(256, 96): 1.3525, (128, 96): 1.73}),
    (192, 192, (4, 240, 416), {(256, 192): 1.2135, (128, 192): 1.349, (256, 96): 1.169, (128, 96): 1.565}),
    (384, 384, (2, 120, 208), {(256, 192): 0.7155, (128, 192): 0.690, (256, 96): 0.659, (128, 96): 0.781}),
    (384, 384, (1, 60, 104), {(256, 192): 0.209, (128, 192): 0.158, (256, 96): 0.141, (128, 96): 0.178}),
]


@pytest.mark.parametrize(("channels", "outputs", "clip", "measured"), MEASURED)
def test_the_fastest_tile_is_chosen(channels, outputs, clip, measured):
    options = forms(channels, outputs, "f16")
    assert {tile(form) for form in options} == set(measured)
    assert tile(choose(options, clip, 132)) == min(measured, key=measured.get)


def test_tiles_cover_pictures_that_they_do_not_divide():
    form = forms(384, 384, "f16")[0]
    assert form.turns(2, 60, 104) == (4 * 8 * 2 * 2, 4, 8)
    assert form.turns(1, 40, 288) == (45 * 2, 9, 5)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
def test_every_form_compiles(channels, outputs, kind):
    try:
        nvrtc.nvrtc()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    for form in (*forms(channels, outputs, kind), forms(channels, outputs, kind, taps=1)[0]):
        assert nvrtc.compile_cubin(form.source(), "sm_90a")[:4] == b"\x7fELF"


def test_a_source_that_does_not_compile_says_why(monkeypatch):
    try:
        nvrtc.nvrtc()
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    with pytest.raises(nvrtc.NvrtcError, match="undefined"):
        nvrtc.compile_cubin("void f() { g(); }", "sm_90a")


def test_the_source_has_its_numbers_in_front():
    form = ConvConfig(96, 96, 128, 96, "bf16")
    source = form.source()
    assert '#define PACK "cvt.rn.bf16x2.f32"' in source
    assert "m64n96k16.f32.bf16.bf16" in source
    assert f"#define STAGES {form.stages}\n" in source


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def draw_inputs(channels, outputs, clip, taps, dtype):
    """Window and weight on the GPU, for a result of `clip`; skips where the kernel cannot run."""
    reason = unsupported(torch.device("cuda", 0), channels, outputs, dtype)
    if reason is not None:
        pytest.skip(reason)
    frames, height, width = clip
    inputs = 9 * taps * channels
    window = draw(frames + taps - 1, height, width, channels, device="cuda", dtype=dtype)
    return window, draw(outputs, inputs, device="cuda", dtype=dtype, scale=inputs**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("taps", [3, 1])
@pytest.mark.parametrize("clip", [(1, 5, 7), (2, 40, 72), (3, 33, 50), (1, 40, 288)])
@pytest.mark.parametrize(("channels", "outputs"), SHAPES)
def test_as_exact_as_cudnn(channels, outputs, clip, taps, dtype):
    window, weight = draw_inputs(channels, outputs, clip, taps, dtype)
    exact = conv_window_ref(window.double(), weight.double())
    limit = 1.05 * error(conv_window_ref(window, weight), exact)
    results = [launch(window, weight, form) for form in forms(channels, outputs, TYPES[dtype][0], taps)]
    for got in (*results, conv_window(window, weight)):
        assert got.shape == (*clip, outputs)
        assert error(got, exact) <= limit
        assert torch.equal(got, results[0]), "tiles of another size, or another run, must not round otherwise"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1, 33), (0, 32), (1, 9), (32, 33)])
@pytest.mark.parametrize(("channels", "outputs"), [(96, 96), (192, 384)])
def test_rows_are_those_of_the_whole_to_the_last_bit(monkeypatch, channels, outputs, rows):
    if unsupported(torch.device("cuda", 0), channels, outputs, torch.float16) is not None:
        pytest.skip("not a Hopper GPU")
    window = draw(4, 33, 50, channels, device="cuda", dtype=torch.float16)
    weight = draw(outputs, 27 * channels, device="cuda", dtype=torch.float16, scale=0.02)
    want = conv_window(window, weight)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: new_empty(x, *shape).fill_(7))
    first, last = rows
    for form in forms(channels, outputs, "f16"):
        got = launch(window, weight, form, rows)
        assert torch.equal(got[:, first:last], want[:, first:last])
        assert (got[:, :first] == 7).all()
        assert (got[:, last:] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("taps", [3, 1])
@pytest.mark.parametrize("clip", [(1, 5, 7), (2, 33, 50), (1, 160, 288)])
@pytest.mark.parametrize(("channels", "outputs"), [(96, 96), (192, 384)])
def test_bias_and_residual_are_added_before_rounding(channels, outputs, clip, taps, dtype):
    window, weight = draw_inputs(channels, outputs, clip, taps, dtype)
    bias, residual = draw(outputs, device="cuda"), draw(*clip, outputs, device="cuda", dtype=dtype)
    for more in ({"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
        wide = {name: x.double() for name, x in more.items()}
        exact = conv_window_ref(window.double(), weight.double(), **wide)
        limit = 1.05 * error(conv_window_ref(window, weight, **more), exact)
        results = [launch(window, weight, f, **more) for f in forms(channels, outputs, TYPES[dtype][0], taps)]
        for got in (*results, conv_window(window, weight, **more)):
            assert error(got, exact) <= limit
            assert torch.equal(got, results[0])


@pytest.mark.gpu
def test_rows_left_out_get_no_residual(monkeypatch):
    if unsupported(torch.device("cuda", 0), 96, 96, torch.float16) is not None:
        pytest.skip("not a Hopper GPU")
    window = draw(1, 33, 50, 96, device="cuda", dtype=torch.float16)
    weight = draw(96, 9 * 96, device="cuda", dtype=torch.float16, scale=0.02)
    more = {"bias": draw(96, device="cuda"), "residual": torch.ones_like(window)}
    want = conv_window(window, weight, **more)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: new_empty(x, *shape).fill_(7))
    for form in forms(96, 96, "f16", taps=1):
        got = launch(window, weight, form, (1, 32), **more)
        assert torch.equal(got[:, 1:32], want[:, 1:32])
        assert (got[:, [0, 32]] == 7).all()


@pytest.mark.gpu
def test_inside_a_cuda_graph():
    if unsupported(torch.device("cuda", 0), 96, 96, torch.float16) is not None:
        pytest.skip("not a Hopper GPU")
    window = draw(6, 32, 48, 96, device="cuda", dtype=torch.float16)
    weight = draw(96, 27 * 96, device="cuda", dtype=torch.float16, scale=0.02)
    conv_window(window, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = conv_window(window, weight)
    window.mul_(0.5)
    graph.replay()
    assert torch.equal(captured, conv_window(window, weight))


def test_the_copy_engine_gets_sizes_innermost_first(monkeypatch):
    from wanrt_kernels import conv_window as module

    seen = []

    class Driver:
        def cuTensorMapEncodeTiled(self, described, code, rank, address, sizes, strides, box, steps, *rest):
            seen.append((code, rank, list(sizes), list(strides), list(box), list(steps), rest))
            return 0

    monkeypatch.setattr(nvrtc, "driver", Driver)
    window = torch.zeros(4, 5, 6, 96, dtype=torch.float16)
    described = module.tensor_map(window.transpose(1, 2), (32, 8, 34, 1), 6, swizzle=64)
    assert ctypes.addressof(described) % 64 == 0
    strides = [6 * 96 * 2, 96 * 2, 5 * 6 * 96 * 2]
    assert seen == [(6, 4, [96, 5, 6, 4], strides, [32, 8, 34, 1], [1, 1, 1, 1], (0, 2, 3, 0))]
