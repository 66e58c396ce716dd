from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from wanrt.models.kv_cache import KVCache
from wanrt.models.transformer import WAN_14B, TransformerConfig, WanTransformer
from wanrt.parallel.apply import apply
from wanrt.parallel.plan import ShardPlan
from wanrt.parallel.topology import Topology

CONFIG = TransformerConfig(dim=48, ffn_dim=96, num_layers=2, num_heads=4, text_dim=8, text_len=4, freq_dim=16)


def whole_model():
    torch.manual_seed(1)
    return WanTransformer(CONFIG).eval()


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_slices_make_the_whole(size):
    plan = ShardPlan.of(Topology.parse(f"tp={size}"))
    split = 0
    for name, parameter in whole_model().state_dict().items():
        slices = [plan.slicer(rank)(name, tuple(parameter.shape)) for rank in range(size)]
        axis = plan.axis(name)
        assert (axis is None) == (slices[0] is None)
        if axis is not None:
            split += 1
            assert torch.equal(torch.cat([parameter[index] for index in slices], dim=axis), parameter)
    assert split == CONFIG.num_layers * 21


def test_what_a_rank_of_14b_holds():
    with torch.device("meta"):
        model = WanTransformer(WAN_14B)
    plan = ShardPlan.of(Topology.parse("tp=4"))
    sizes = {
        name: p.numel() // (4 if plan.axis(name) is not None else 1) for name, p in model.named_parameters()
    }
    assert sum(p.numel() for p in model.parameters()) == 14_288_491_584
    assert 0.25 < sum(sizes.values()) / 14_288_491_584 < 0.27
    assert plan.local_heads(40) == 10


def test_ulysses_splits_no_weight():
    plan = ShardPlan.of(Topology.parse("ulysses=4"))
    assert all(plan.axis(name) is None for name in whole_model().state_dict())
    assert plan.local_heads(40) == 10


def filled_from_slices(group, path):
    """A rank's model built on meta and filled with its slices of a file, against one cut from the whole."""
    from safetensors import safe_open

    plan = ShardPlan.of(Topology.parse("tp=2"))
    with torch.device("meta"):
        model = apply(WanTransformer(CONFIG), plan, group)
    slicer = plan.slicer(group.rank())
    state = {}
    with safe_open(path, "pt") as file:
        for name in model.state_dict():
            part = file.get_slice(name)
            index = slicer(name, tuple(part.get_shape()))
            state[name] = part[index] if index else file.get_tensor(name)
    model.load_state_dict(state, strict=True, assign=True)
    cut = apply(whole_model(), plan, group)
    same = all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), cut.state_dict().values(), strict=True)
    )
    return same, sum(p.numel() for p in model.parameters())


def test_a_rank_fills_a_model_on_meta_from_its_slices(on_ranks, tmp_path):
    whole = whole_model()
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    results = on_ranks(2, filled_from_slices, str(tmp_path / "model.safetensors"))
    assert all(same for same, _ in results)
    assert results[0][1] < 0.7 * sum(p.numel() for p in whole.parameters())


def one_rank(group):
    for topology in ("pp1+tp=1", "pp1+ulysses=1"):
        model = whole_model()
        before = [(name, type(module)) for name, module in model.named_modules()], model.elementwise
        assert apply(model, ShardPlan.of(Topology.parse(topology)), group) is model
        assert ([(name, type(module)) for name, module in model.named_modules()], model.elementwise) == before


def test_the_model_of_one_rank_stays_as_it_is(on_ranks):
    on_ranks(1, one_rank)


def wrong_size(group):
    with pytest.raises(ValueError, match="mesh of 2 ranks, expected 4"):
        apply(whole_model(), ShardPlan.of(Topology.parse("tp=4")), group)


def test_a_group_of_the_wrong_size_is_refused(on_ranks):
    on_ranks(2, wrong_size)


def test_the_caches_of_the_ranks_hold_all_heads_once():
    plan = ShardPlan.of(Topology.parse("ulysses=2"))
    cache = KVCache.allocate(CONFIG, policy="recompute", frames=3, grid=(2, 2), heads=plan.local_heads(4))
    assert cache.layers[0].key.shape == (1, 24, 2, 12)
