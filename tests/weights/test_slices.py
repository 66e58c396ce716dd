"""What a rank of a sharded model reads: its own lines of every tensor, and no more of the file."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from wanrt.errors import WeightsError
from wanrt.models.transformer import TransformerConfig, WanTransformer
from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import Topology
from wanrt.weights import sources
from wanrt.weights.loading import build_on_meta, fill, open_transformer
from wanrt.weights.sources import SafetensorsSource

PARTS = [
    (slice(2, 5), slice(None)),
    (slice(None), slice(3, 9)),
    (slice(1, 6), slice(0, 4)),
    (slice(1, 7, 2), slice(None, None, 3)),
    (slice(4, 4), slice(None)),
    (slice(None), slice(None)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("scratch", [1, 4 << 20])
def test_parts_are_the_slices_of_the_whole(dtype, scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SCRATCH", scratch)
    state = {"a": torch.randn(7, 12).to(dtype), "b": torch.randn(3).to(dtype), "c": torch.randn(()).to(dtype)}
    save_file(state, tmp_path / "x.safetensors")
    source = SafetensorsSource(tmp_path / "x.safetensors")
    for index in PARTS:
        part = source.read("a", index)
        assert part.is_contiguous()
        assert torch.equal(part.float(), state["a"].float()[index])
    assert torch.equal(source.read("b", (slice(1, 3),)).float(), state["b"].float()[1:])
    assert torch.equal(source.read("c", ()).float(), state["c"].float())


def test_a_file_that_ends_early_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(64, 64)}, path)
    source = SafetensorsSource(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(WeightsError, match="ends inside a; fetch it again"):
        source.read("a", (slice(32, 64), slice(None)))


class Group:
    """A rank's place in a mesh; nothing is exchanged while loading."""

    def __init__(self, size, rank):
        self.size, self.rank = (lambda: size), (lambda: rank)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A transformer in three shards, bf16."""
    folder = tmp_path_factory.mktemp("sharded")
    config = TransformerConfig(dim=256, ffn_dim=1024, num_layers=4, num_heads=4, text_dim=64, freq_dim=64)
    shapes = build_on_meta(lambda: WanTransformer(config)).state_dict()
    state = {name: torch.randn(t.shape).to(torch.bfloat16) for name, t in shapes.items()}
    home = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(state)}
    for shard in set(home.values()):
        save_file({name: t for name, t in state.items() if home[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    return index, config, state


def load_part(checkpoint, plan, rank, device):
    """A rank's part of the transformer, filled."""
    from wanrt.parallel.apply import apply

    path, config, _ = checkpoint
    model = build_on_meta(lambda: WanTransformer(config))
    with torch.device("meta"):
        apply(model, plan, Group(plan.size, rank))
    return fill(model, open_transformer(path), device, torch.bfloat16, slicer=plan.slicer(rank))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_its_lines_alone(checkpoint, ranks, monkeypatch):
    """Bytes asked of the kernel, counted by tensor; the mapping, which reads ahead, is not touched at all."""
    state = checkpoint[-1]
    plan = ShardPlan.of(Topology.parse(f"tp={ranks}"))
    asked, preadv = [], os.preadv

    def counting(descriptor, rooms, at):
        asked.append(sum(room.nbytes for room in rooms))
        return preadv(descriptor, rooms, at)

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(SafetensorsSource, "_whole", None)
    for rank in range(ranks):
        asked.clear()
        model, slicer = load_part(checkpoint, plan, rank, "cpu"), plan.slicer(rank)
        lines = 0
        for name, tensor in state.items():
            index = slicer(name, tuple(tensor.shape))
            lines += tensor.nbytes if index is None else tensor[index[0]].nbytes
        assert sum(asked) == lines < 0.75 * sum(t.nbytes for t in state.values())
        part = model.state_dict()["blocks.1.ffn.2.weight"]
        assert torch.equal(part, state["blocks.1.ffn.2.weight"][slicer("blocks.1.ffn.2.weight", (256, 1024))])


@pytest.mark.gpu
def test_parts_on_their_way_to_a_gpu(checkpoint, monkeypatch):
    """They go through page-locked memory, the same again and again, and are there before it is used again."""
    path, _, state = checkpoint
    plan = ShardPlan.of(Topology.parse("tp=2"))
    source = open_transformer(path).source
    places = set()
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.self_attn.q.weight", "blocks.1.self_attn.o.weight"):
        part = source.read(name, plan.slicer(1)(name, state[name].shape), pinned=True)
        assert part.is_pinned()
        places.add(part.data_ptr())
        del part
    assert len(places) == 1
    with monkeypatch.context() as smaller:
        smaller.setattr(sources, "PINNED", 1000)
        assert not source.read("head.head.weight", (slice(None), slice(None)), pinned=True).is_pinned()
    for rank in range(2):
        model, slicer = load_part(checkpoint, plan, rank, "cuda"), plan.slicer(rank)
        for name, tensor in model.state_dict().items():
            index = slicer(name, tuple(state[name].shape))
            want = state[name] if index is None else state[name][index]
            assert torch.equal(tensor.cpu(), want.to(tensor.dtype)), name
