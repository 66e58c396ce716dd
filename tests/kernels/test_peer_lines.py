"""Border lines and parts through other ranks' memory: kernels against references, all ranks in one process."""

import pytest
import torch

from wanrt_kernels.peer_lines import (
    LineConfig,
    Room,
    send_lines,
    send_lines_ref,
    send_part,
    send_part_ref,
    spacing,
    take_lines,
    take_lines_ref,
)
from wanrt_kernels.shared import Shared

UNTOUCHED = 7
LINES = [
    # ranks, rows and values of a line, gap between rows
    (2, 1, 5, 0),
    (3, 4, 24, 8),
    (4, 21, 96, 40),
    (2, 3, 2100, 4),
]


def rooms_of(ranks, nbytes, device):
    """One room a rank, filled with a number that no test sends."""
    size = -(-nbytes // 16) * 16
    owns = [torch.full((2, size), UNTOUCHED, dtype=torch.uint8, device=device) for _ in range(ranks)]
    addresses = torch.tensor([own.data_ptr() for own in owns], device=device)
    return [Room(Shared(own, addresses), torch.zeros(2, dtype=torch.int64, device=device)) for own in owns]


def draw(*shape, dtype, device):
    return torch.randn(shape).to(device, dtype)


def check_lines(case, dtype, device):
    """Three exchanges: both sets, and the first one again; what is around the halo lines stays."""
    ranks, rows, columns, gap = case
    rooms = rooms_of(ranks, 2 * spacing(rows * columns, dtype) * dtype.itemsize, device)
    shadows = [room.own.clone() for room in rooms]
    for exchange in range(3):
        # two own lines between two halo lines, as in [T, H, W, C] along columns or rows
        maps = [draw(rows, 4 * columns + gap, dtype=dtype, device=device) for _ in rooms]
        wants = [x.clone() for x in maps]
        edges = [[x[:, i * columns : (i + 1) * columns] for i in range(4)] for x in maps]
        for rank, (room, (_, first, last, _)) in enumerate(zip(rooms, edges, strict=True)):
            sent = first if rank else None, last if rank + 1 < ranks else None
            send_lines(*sent, room, rank)
            send_lines_ref(*sent, shadows, exchange, rank)
        for got, want in zip(rooms, shadows, strict=True):
            assert torch.equal(got.own, want)
        for rank, (room, (before, _, _, after)) in enumerate(zip(rooms, edges, strict=True)):
            asked = before if rank else None, after if rank + 1 < ranks else None
            take_lines(*asked, room)
            assert room.turn.tolist() == [exchange + 1, exchange]
            if rank:
                wants[rank][:, :columns] = edges[rank - 1][2]
            if rank + 1 < ranks:
                wants[rank][:, 3 * columns : 4 * columns] = edges[rank + 1][1]
        assert all(torch.equal(x, want) for x, want in zip(maps, wants, strict=True))


def check_parts(dtype, device, *, to):
    """Uneven bands side by side on the first `to` ranks, then once more in the other set."""
    rows, widths = 5, (3, 40, 21)
    whole = sum(widths)
    rooms = rooms_of(3, rows * whole * dtype.itemsize, device)  # whole rows, no more
    shadows = [room.own.clone() for room in rooms]
    for exchange in range(2):
        want = draw(rows, whole, dtype=dtype, device=device)
        for rank, part in enumerate(want.split(widths, dim=1)):
            start = sum(widths[:rank])
            send_part(part, rooms[rank], ranks=to, columns=whole, start=start)
            send_part_ref(part, shadows[:to], exchange, whole, start)
        assert all(torch.equal(room.own, shadow) for room, shadow in zip(rooms, shadows, strict=True))
        for rank, room in enumerate(rooms):
            got = torch.empty_like(want) if rank < to else None
            take_lines(None if got is None else got.view(1, -1), None, room)
            assert room.turn.tolist() == [exchange + 1, exchange]
            assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", LINES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
def test_interpreted_lines_arrive(case, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_lines(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*LINES, (2, 4, 576 * 96, 96), (2, 1280, 96, 0)])
def test_lines_arrive(case, dtype):
    check_lines(case, dtype, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
def test_a_rank_one_exchange_ahead_spoils_nothing():
    """Between two barriers a neighbour may send the next lines before this rank took the last ones, not more."""
    pytest.importorskip("triton", reason="Triton is not installed")
    rooms = rooms_of(2, 64, "cpu")
    lines = torch.arange(24.0).view(3, 1, 8)
    found = torch.empty(1, 8)
    send_lines(None, lines[0], rooms[0], 0)
    for exchange in range(2):
        send_lines(found, None, rooms[1], 1)
        take_lines(None, None, rooms[0])
        send_lines(None, lines[exchange + 1], rooms[0], 0)  # behind the barrier of this exchange
        take_lines(found, None, rooms[1])
        assert torch.equal(found, lines[exchange])


@pytest.mark.parametrize("to", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernels are tested instead")
def test_interpreted_parts_arrive(dtype, to):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_parts(dtype, "cpu", to=to)


@pytest.mark.gpu
@pytest.mark.parametrize("to", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_arrive(dtype, to):
    check_parts(dtype, "cuda", to=to)


@pytest.mark.gpu
def test_a_graph_of_one_exchange_takes_turns():
    """Replayed, it uses both sets, as what runs between the replays does."""
    rooms = rooms_of(2, 64, "cuda")
    line = torch.zeros(1, 8, device="cuda")
    found = torch.zeros(1, 8, device="cuda")

    def exchange():
        send_lines(None, line, rooms[0], 0)
        send_lines(line, None, rooms[1], 1)
        take_lines(None, None, rooms[0])
        take_lines(found, None, rooms[1])

    exchange()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange()
    for turn in range(1, 8):
        line.fill_(turn)
        if turn % 3:
            graph.replay()
        else:
            exchange()
        assert (found == turn).all()
        assert rooms[1].turn.tolist() == [turn + 1, turn]


def test_references_are_each_others_inverse():
    first, last = torch.randn(2, 3, 5).unbind()
    owns = [torch.zeros(2, 256, dtype=torch.uint8) for _ in range(3)]
    for exchange in range(2):
        send_lines_ref(first, last, owns, exchange, 1)
        before, after = torch.zeros(3, 5), torch.zeros(3, 5)
        take_lines_ref(None, after, owns[0], exchange)
        take_lines_ref(before, None, owns[2], exchange)
        assert torch.equal(after, first)
        assert torch.equal(before, last)


def test_every_program_has_as_many_values():
    for columns in (1, 5, 96, 2048, 55296):
        config = LineConfig.of(columns)
        assert config.rows * config.columns == 2048
        rows, across = config.grid(40, columns)
        assert rows * config.rows >= 40
        assert across * config.columns >= columns


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (None, None, "last, first: got none"),
        (torch.zeros(2, 3, 4), None, "first: got shape \\(2, 3, 4\\)"),
        (torch.zeros(4, 4).t()[:, :2], None, "first: got .* rows contiguous"),
        (torch.zeros(2, 4), torch.zeros(2, 5), "first: got .* expected as the other one"),
        (torch.zeros(3, 40), None, "room: got 256 bytes a set, expected 960 for first"),
    ],
)
def test_what_does_not_fit_is_refused(first, last, message):
    room = rooms_of(3, 256, "cpu")[1]
    with pytest.raises(ValueError, match=message):
        send_lines(first, last, room, 1)


def test_parts_that_do_not_fit_are_refused():
    room = rooms_of(2, 256, "cpu")[0]
    with pytest.raises(ValueError, match="got columns 3 to 6, expected within 5"):
        send_part(torch.zeros(2, 3), room, ranks=2, columns=5, start=3)
    with pytest.raises(ValueError, match="room: got 256 bytes a set, expected 4000 for part"):
        send_part(torch.zeros(10, 3), room, ranks=2, columns=100, start=3)
