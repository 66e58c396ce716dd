"""A VAE split over gloo ranks against the whole one: pixels, latents, state, bytes."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.file_peers import FilePeers
from wanrt.errors import UsageError
from wanrt.models.vae import VaeConfig, WanVae
from wanrt.models.vae_fast import FastConv, FastVae
from wanrt.parallel.bands import Band, GroupNeighbours
from wanrt.parallel.peer_bands import PeerNeighbours
from wanrt.parallel.vae_axis import Axis
from wanrt.parallel.vae_split import SplitVae, split
from wanrt.parallel.vae_traffic import VaeSizes, decode_exchange, encode_exchange

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}  # of the output's scale
CONFIGS = {
    "wide": VaeConfig(base_dim=8),
    "short": VaeConfig(base_dim=16, num_res_blocks=1),
}
LATENTS = 5


def build(config, dtype=torch.float32, fast=False):
    torch.manual_seed(0)
    vae = WanVae(config).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return FastVae(vae, dtype=dtype, encode_dtype=dtype) if fast else vae.to(dtype)


def drawn(size, seed):
    return torch.randn(1, 16, LATENTS, *size, generator=torch.Generator().manual_seed(seed))


class Counting:
    """The neighbours it is made from, counting what a rank sends."""

    def __init__(self, whole, size):
        self.whole, self.size, self.sent = whole, size, 0

    def swap(self, first, last, before, after, dim):
        self.sent += sum(line.nbytes for line in (first, last) if line is not None)
        self.whole.swap(first, last, before, after, dim)

    def gather(self, own, lengths, dim):
        longest = own.nbytes // own.shape[dim] * max(lengths)
        self.sent += longest * (self.size - 1)
        return self.whole.gather(own, lengths, dim)

    def collect(self, own, lengths, dim):
        return self.whole.collect(own, lengths, dim)


def reach(group, folder):
    """The neighbours through gloo, or with a folder through files that stand for GPUs' shared memory."""
    if folder is None:
        return GroupNeighbours(group)
    return PeerNeighbours(FilePeers(group, folder), torch.device("cpu"))


def spoil_unread(module, arguments, out):
    """What a kernel that leaves rows unwritten may do."""
    top, bottom = module.unread
    out[:, :top] = out[:, out.shape[1] - bottom :] = torch.nan


def split_run(group, config, size, dtype, fast, folder=None):
    """Two streams mixed latent by latent, the first one then again after a reset; anchors; a clip; bytes sent."""
    band = Band.of(*size, group.size(), group.rank())
    neighbours = Counting(reach(group, folder), group.size())
    vae = build(CONFIGS[config], dtype, fast)
    for module in vae.modules():
        if isinstance(module, FastConv):
            module.register_forward_hook(spoil_unread)
    split(vae, band, neighbours)
    spoilt = [module.unread for module in vae.modules() if isinstance(module, FastConv)]
    assert ((band.before, band.after) in spoilt) == (fast and band.axis is Axis.ROWS)
    part = SplitVae(vae, band, neighbours)
    first, second = part.decoder_state(), part.decoder_state()
    mixed, anchors = [[], []], []
    for i in range(LATENTS):
        for stream, state in enumerate((first, second)):
            latent = drawn(size, stream)[:, :, i : i + 1]
            mixed[stream].append(part.decode(latent, state))
        anchors.append(part.encode_frame(mixed[0][-1][:, :, -1:]))
    first.reset()
    again = part.decode(drawn(size, 0), first)
    pixels = [torch.cat(pieces, dim=2) for pieces in mixed]
    assert torch.equal(again, pixels[0])
    before = neighbours.sent
    part.decode(drawn(size, 0)[:, :, :1], first)
    decode = neighbours.sent - before
    part.encode_frame(again[:, :, -1:])
    encode = neighbours.sent - before - decode
    whole = [x.numpy() for x in map(part.collect, pixels) if x is not None]
    clip = None if fast else vae.encode(pixels[0], vae.encoder_state()).numpy()
    return whole, torch.cat(anchors, dim=2).numpy(), clip, (decode, encode), first.nbytes


def split_run_by_memory(group, *arguments):
    """As `split_run`, where the ranks store in each other's memory; its last argument is the folder."""
    return split_run(group, *arguments)


def worst(got, want):
    return (torch.from_numpy(got) - want).abs().max().item() / want.abs().max().item()


def whole_run(config, size, dtype):
    vae = build(CONFIGS[config], dtype)
    states = [vae.decoder_state() for _ in range(2)]
    pixels = [vae.decode(drawn(size, stream), state) for stream, state in enumerate(states)]
    ends = [4 * i for i in range(LATENTS)]
    anchors = torch.cat([vae.encode_frame(pixels[0][:, :, end : end + 1]) for end in ends], dim=2)
    return pixels, anchors, vae.encode(pixels[0], vae.encoder_state()), states[0].nbytes


SLOW = pytest.mark.slow
F32, F64 = torch.float32, torch.float64
CASES = [
    pytest.param(3, "wide", (2, 5), F64, False, id="3 uneven columns"),
    pytest.param(3, "short", (7, 4), F32, False, id="3 uneven rows"),
    pytest.param(4, "short", (3, 4), F32, False, id="4 columns of one latent", marks=SLOW),
    pytest.param(3, "wide", (5, 3), F32, True, id="3 uneven rows, repacked"),
    pytest.param(2, "short", (3, 4), F32, True, id="2 uneven rows, repacked"),
    pytest.param(4, "wide", (2, 7), F32, True, id="4 uneven columns, repacked", marks=SLOW),
]


@pytest.mark.parametrize(("ranks", "config", "size", "dtype", "fast"), CASES)
def test_bands_are_the_whole(on_ranks, ranks, config, size, dtype, fast):
    """Five latents of two streams, their anchors, and a clip, to rounding; in fp64 to that of fp64.

    Each rank's state is of its lines and halo lines, and what it sends is what the plan says.
    """
    pixels, anchors, clip, state_bytes = whole_run(config, size, dtype)
    found = on_ranks(ranks, split_run, config, size, dtype, fast)
    errors = []
    assert [len(rank[0]) for rank in found] == [2] + [0] * (ranks - 1)  # pixels go to the first rank
    for got, got_anchors, *_ in found:
        errors += [worst(x, want) for x, want in zip(got, pixels, strict=False)]
        errors.append(worst(got_anchors, anchors))
    if not fast:
        band = Band.of(*size, ranks, 0)
        parts = torch.cat(
            [torch.from_numpy(rank[2]) for rank in found], dim=-2 if band.axis is Axis.ROWS else -1
        )
        errors.append(worst(parts.numpy(), clip))
    print(f"{ranks} ranks: {max(errors):.1e}")
    assert max(errors) <= TOLERANCE[dtype]
    halos = (
        2 * (ranks - 1) / Band.of(*size, ranks, 0).bounds[-1]
    )  # one line at every size, so the more of the whole the smaller
    assert state_bytes < sum(rank[4] for rank in found) < (1 + halos) * state_bytes
    check_bytes(found, CONFIGS[config], size, dtype.itemsize, fast)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
@pytest.mark.parametrize(
    ("ranks", "size", "fast"),
    [
        pytest.param(3, (2, 4), True, id="3 uneven columns, repacked"),
        pytest.param(2, (3, 2), True, id="2 uneven rows, repacked"),
        pytest.param(3, (2, 3), False, id="3 columns of one latent", marks=SLOW),
    ],
)
def test_shared_memory_brings_what_messages_bring(on_ranks, tmp_path, ranks, size, fast):
    """Pixels, anchors and the clip to the last bit, whatever number of exchanges a call has."""
    pytest.importorskip("triton", reason="Triton is not installed")
    want = on_ranks(ranks, split_run, "short", size, F32, fast)
    (tmp_path / "memory").mkdir()
    found = on_ranks(ranks, split_run_by_memory, "short", size, F32, fast, str(tmp_path / "memory"))
    for (got, *rest), (pixels, *others) in zip(found, want, strict=True):
        assert all((x == y).all() for x, y in zip(got, pixels, strict=True))
        assert (rest[0] == others[0]).all()
        assert fast or (rest[1] == others[1]).all()
        assert rest[2] == others[2]


def check_bytes(found, config, size, element, fast):
    """What the busiest rank sent is the plan's estimate; the repacked encoder pads its 3 pixel channels to 8."""
    ranks, sizes = len(found), VaeSizes(config.base_dim, *size, config.num_res_blocks)
    decode, encode = (max(rank[3][call] for rank in found) for call in (0, 1))
    sides = 2 if ranks > 2 else 1
    padding = sides * (8 - 3) * 8 * sizes.cut(ranks)[1] * element if fast else 0
    print(f"bytes a latent {decode}, an anchor {encode}")
    assert decode == decode_exchange(sizes, ranks, element).bytes
    assert encode == encode_exchange(sizes, ranks, element).bytes + padding


@pytest.mark.parametrize(
    ("height", "width", "parts", "axis", "lengths"),
    [
        (40, 72, 4, Axis.ROWS, [10] * 4),
        (7, 3, 3, Axis.ROWS, [2, 2, 3]),
        (3, 7, 5, Axis.COLUMNS, [1, 1, 2, 1, 2]),
    ],
)
def test_bands_cover_the_picture(height, width, parts, axis, lengths):
    bands = [Band.of(height, width, parts, i) for i in range(parts)]
    assert [band.lengths[band.index] for band in bands] == lengths
    assert {band.axis for band in bands} == {axis}
    assert [(band.before, band.after) for band in bands] == [(0, 1), *[(1, 1)] * (parts - 2), (1, 0)]


def test_more_ranks_than_lines_are_refused():
    with pytest.raises(
        UsageError, match=r"vae=5 > 4, the longer side of a latent of 4x3; nearest valid: vae=4"
    ):
        Band.of(3, 4, 5, 0)


def test_a_latent_of_another_size_is_refused():
    part = SplitVae(build(CONFIGS["short"]), Band.of(3, 4, 2, 0), None)
    with pytest.raises(ValueError, match=r"got a latent of 6 rows, expected 3"):
        part.decode(drawn((6, 4), 0)[:, :, :1], part.decoder_state())
