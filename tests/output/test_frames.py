"""Frames on their way to a sink: what they become on the CPU, and that a device makes the same."""

import numpy as np
import pytest
import torch

from wanrt.output import PixelFormat, VideoSpec
from wanrt.output.frames import FrameBlock, to_block
from wanrt_kernels.nv12 import nv12_ref

SPEC = VideoSpec(96, 64, 16)


@pytest.fixture
def pixels(movie):
    return torch.from_numpy(movie(5))


def test_nv12_and_rgb_blocks(pixels):
    nv12 = to_block(pixels, SPEC, PixelFormat.NV12)
    assert torch.equal(nv12.data, nv12_ref(pixels))
    assert len(nv12) == 5
    assert np.array_equal(to_block(pixels.numpy(), SPEC, PixelFormat.RGB).numpy(), pixels.numpy())


def test_floats_round_to_the_nearest_level(pixels):
    floats = pixels.float() / 127.5 - 1
    assert np.array_equal(to_block(floats, SPEC, PixelFormat.RGB).numpy(), pixels.numpy())
    assert to_block(floats * 9, SPEC, PixelFormat.RGB).numpy().min() == 0


def test_blocks_pass_when_they_fit(pixels):
    block = to_block(pixels, SPEC, PixelFormat.NV12)
    assert to_block(block, SPEC, PixelFormat.NV12) is block
    with pytest.raises(ValueError, match=r"got nv12 \[5, 96, 96\], expected rgb24 \[T, 64, 96, 3\]"):
        to_block(block, SPEC, PixelFormat.RGB)
    with pytest.raises(ValueError, match="expected nv12"):
        to_block(FrameBlock(block.data[:, 2:], PixelFormat.NV12), SPEC, PixelFormat.NV12)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", list(PixelFormat))
def test_a_device_makes_the_same(pixels, wanted):
    floats = (pixels.float() / 127.5 - 1).half()
    block = to_block(floats.cuda(), SPEC, wanted)
    assert block.ready is not None
    assert block.data.is_pinned()
    want = to_block(floats, SPEC, wanted).numpy()
    difference = np.abs(block.numpy().astype(int) - want.astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


@pytest.mark.gpu
def test_frames_from_a_device_reach_the_file(tmp_path, pixels, movie, psnr):
    import av

    from wanrt.output import QueuedSink, open_sink

    sink = QueuedSink(open_sink(tmp_path / "a.mp4", SPEC, quality=100))
    for _ in range(4):
        sink.write(pixels.cuda())
    with av.open(sink.finish()) as written:
        got = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    assert len(got) == 20
    assert psnr(np.stack(got[:5]), movie(5)) >= 40
