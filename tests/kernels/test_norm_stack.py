"""The kernel against its reference: here under Triton's interpreter, on a GPU for real (`-m gpu`)."""

import pytest
import torch

from wanrt_kernels.norm_stack import launch, norm_stack, norm_stack_ref

pytest.importorskip("triton", reason="Triton is not installed")

# relative to the largest value; half precisions round once on the way out
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

CASES = [
    # frames, height, width, channels, options
    (1, 4, 6, 16, {"state"}),
    (4, 5, 7, 96, {"state", "bias", "residual", "total"}),
    (2, 3, 5, 192, {"state", "bias"}),
    (2, 4, 4, 384, {"bias", "residual", "total"}),
    (2, 4, 6, 24, {"state", "bias", "unshuffle", "total"}),
    (1, 8, 4, 96, {"unshuffle", "total", "bias"}),
    (2, 3, 3, 40, {"no-scale", "state", "bias", "residual"}),
    (2, 3, 3, 40, {"no-scale", "bias", "residual", "total"}),
    (1, 3, 3, 64, {"no-silu", "total"}),
    (3, 1, 1, 1, {"state"}),
    (4, 5, 7, 96, {"state", "window", "bias", "residual", "total"}),
    (2, 4, 6, 24, {"state", "window", "bias", "unshuffle", "total"}),
    (3, 2, 5, 40, {"no-scale", "state", "window", "bias"}),
    (2, 6, 4, 24, {"state", "window", "bias", "unshuffle", "rows-left-out", "total"}),
    (1, 4, 6, 40, {"bias", "unshuffle", "columns-left-out", "total"}),
]
MARGINS = {"rows-left-out": (1, 1, 0, 0), "columns-left-out": (0, 0, 1, 0)}  # of one pixel, as a split VAE


def make(case, dtype, device):
    frames, height, width, channels, options = case
    generator = torch.Generator().manual_seed(frames * 1000 + channels)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    shuffled = (frames, height // 2 + 1, width // 2 + 1, 4 * channels)
    margin = next((MARGINS[name] for name in options & set(MARGINS)), (0, 0, 0, 0))
    height, width = height - margin[0] - margin[1], width - margin[2] - margin[3]
    x = draw(*(shuffled if "unshuffle" in options else (frames, height, width, channels)))
    return (
        x,
        None if "no-scale" in options else draw(channels, dtype=torch.float32),
        {
            "bias": draw(channels, dtype=torch.float32) if "bias" in options else None,
            "residual": draw(frames, height, width, channels) if "residual" in options else None,
            "state": draw(2, height, width, channels) if "state" in options else None,
            "unshuffle": "unshuffle" in options,
            "margin": margin,
            "silu": "no-silu" not in options,
            "window": "window" in options,
        },
    )


def compare(case, dtype, device):
    x, scale, options = make(case, dtype, device)
    reference_state = None if options["state"] is None else options["state"].clone()
    want, want_total = norm_stack_ref(x, scale, **{**options, "state": reference_state})
    got, got_total = launch(x, scale, **options, keep_total="total" in case[4])
    pairs = [(got, want)]
    if "total" in case[4]:
        pairs.append((got_total, want_total))
    if reference_state is not None:
        pairs.append((options["state"], reference_state))
    for ours, theirs in pairs:
        error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel is tested instead")
def test_interpreted_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "case", [*CASES, (4, 320, 576, 96, {"state", "window", "bias", "residual", "total"})]
)
def test_kernel_equals_reference(case, dtype):
    compare(case, dtype, "cuda")


def test_reference_stacks_three_consecutive_frames():
    x = torch.randn(4, 2, 3, 8)
    state = torch.randn(2, 2, 3, 8)
    clip = torch.cat([state, x])
    stacked, total = norm_stack_ref(x, None, state=state)
    for t in range(4):
        assert torch.equal(stacked[t], torch.cat([clip[t], clip[t + 1], clip[t + 2]], dim=-1))
    assert torch.equal(state, clip[-2:])
    assert torch.equal(total, x)


def test_reference_puts_the_past_in_front_of_a_window():
    x, state = torch.randn(3, 2, 3, 8), torch.randn(2, 2, 3, 8)
    clip = torch.cat([state, x])
    window, _ = norm_stack_ref(x, None, state=state, window=True)
    assert torch.equal(window, clip)
    assert torch.equal(state, clip[-2:])


def test_wrong_shapes_say_what_was_expected():
    x = torch.randn(1, 2, 2, 8)
    with pytest.raises(
        ValueError, match=r"state: got shape \(1, 2, 2, 8\); expected contiguous \[2, 2, 2, 8\]"
    ):
        norm_stack(x, None, state=torch.zeros(1, 2, 2, 8))
    with pytest.raises(ValueError, match="without unshuffle"):
        norm_stack(x, None, margin=(1, 0, 0, 0))
    with pytest.raises(ValueError, match="strides"):
        norm_stack(x.transpose(1, 2), None)
