"""RGB to NV12: reference against swscale's idea of BT.709 and against a naive oracle; kernel against
reference."""

import numpy as np
import pytest
import torch

from wanrt_kernels.nv12 import nv12_ref, rgb_to_nv12

SIZES = [(1, 2, 2), (2, 6, 10), (1, 16, 130), (3, 34, 258), (0, 4, 4)]


def naive(rgb: np.ndarray) -> np.ndarray:
    """One pixel at a time, float64, straight from the text of BT.709."""
    height, width, _ = rgb.shape
    out = np.zeros((height * 3 // 2, width))
    value = rgb.astype(np.float64) / 255
    luma = value @ np.array([0.2126, 0.7152, 0.0722])
    blue, red = (value[..., 2] - luma) / 1.8556, (value[..., 0] - luma) / 1.5748
    for y in range(height):
        for x in range(width):
            out[y, x] = 16 + 219 * luma[y, x]
    for y in range(height // 2):
        for x in range(width // 2):
            for plane, offset in ((blue, 0), (red, 1)):
                total = 0.0
                for dy in (0, 1):
                    for dx, weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                        total += 0.5 * weight * plane[2 * y + dy, max(2 * x + dx, 0)]
                out[height + y, 2 * x + offset] = 128 + 224 * total
    return out


def test_reference_against_the_naive_oracle() -> None:
    rgb = torch.randint(0, 256, (2, 12, 18, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    got = nv12_ref(rgb).numpy().astype(np.float64)
    want = np.stack([naive(frame) for frame in rgb.numpy()])
    assert np.abs(got - want).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("rgb", "ycbcr"),
    [
        ((0, 0, 0), (16, 128, 128)),
        ((255, 255, 255), (235, 128, 128)),
        ((255, 0, 0), (63, 102, 240)),  # 100 % bars of BT.709
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
    ],
)
def test_known_colours(rgb: tuple[int, ...], ycbcr: tuple[int, ...]) -> None:
    frame = torch.tensor(rgb, dtype=torch.uint8).expand(1, 4, 4, 3)
    out = rgb_to_nv12(frame)[0]
    assert (out[0, 0], out[4, 0], out[4, 1]) == ycbcr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_mean_the_same_as_bytes(dtype: torch.dtype) -> None:
    rgb = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    floats = (rgb.float() / 127.5 - 1).to(dtype)
    # one level in 255 is 1/127.5 of the float range: fp16 carries 2^-11, bf16 only 2^-8 near 1
    tolerance = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    difference = nv12_ref(floats).int() - nv12_ref(rgb).int()
    assert difference.abs().max() <= tolerance


def test_floats_out_of_range_are_clamped() -> None:
    wild = torch.tensor([-3.0, 4.0, 1.0]).expand(1, 2, 2, 3)
    tame = torch.tensor([0, 255, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    assert torch.equal(nv12_ref(wild), nv12_ref(tame))


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((1, 5, 4, 3), torch.uint8, "4x5, expected an even"),
        ((1, 4, 4, 4), torch.uint8, r"expected \[T, H, W, 3\]"),
        ((4, 4, 3), torch.uint8, r"expected \[T, H, W, 3\]"),
        ((1, 4, 4, 3), torch.int32, "int32, expected uint8"),
    ],
)
def test_refusals(shape: tuple[int, ...], dtype: torch.dtype, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rgb_to_nv12(torch.zeros(shape, dtype=dtype))


def test_out_is_checked_and_filled() -> None:
    rgb = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    out = torch.empty(1, 6, 4, dtype=torch.uint8)
    assert rgb_to_nv12(rgb, out=out) is out
    assert out[0, 0, 0] == 16
    with pytest.raises(ValueError, match="expected contiguous uint8"):
        rgb_to_nv12(rgb, out=out[:, :4])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device test covers it")
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 2, 2), (2, 6, 10), (1, 4, 130), (0, 4, 4)])
def test_kernel_in_the_interpreter(frames: int, height: int, width: int) -> None:
    """fp32 sums in another order may fall on the other side of a half: off by one in 1 % of the bytes at
    most."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(width)
    rgb = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    planar = (torch.rand(3, frames, height, width, generator=generator) * 2.4 - 1.2).permute(1, 2, 3, 0)
    for pixels in (rgb, planar, planar.half()):
        got, want = rgb_to_nv12(pixels, backend="triton"), nv12_ref(pixels)
        assert got.shape == want.shape
        far = (got.int() - want.int()).abs().float()
        assert not far.numel() or (far.max() <= 1 and far.mean() < 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (12, 480, 832)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_kernel_on_the_device(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    frames, height, width = size
    rgb = torch.randint(0, 256, (3, frames, height, width), dtype=torch.uint8, device="cuda")
    pixels = (rgb if dtype == torch.uint8 else (rgb.float() / 127.5 - 1).to(dtype)).permute(1, 2, 3, 0)
    got, want = rgb_to_nv12(pixels), nv12_ref(pixels)
    far = (got.int() - want.int()).abs().float()
    assert not far.numel() or (far.max() <= 1 and far.mean() < 1e-3)
