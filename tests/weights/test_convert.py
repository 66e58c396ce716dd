"""Rewritten checkpoints: other names, dtypes, shards; read back by other libraries."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanrt.errors import OutputError, WeightsError
from wanrt.weights.checkpoint import open_checkpoint
from wanrt.weights.convert import convert
from wanrt.weights.names import Kind, Naming, other_naming


@pytest.fixture(params=[Kind.TRANSFORMER, Kind.VAE, Kind.TEXT_ENCODER])
def kind(request):
    return request.param


@pytest.fixture
def source(kind, zoo, tmp_path):
    path = tmp_path / "source.pt"
    torch.save({"generator": {f"model.{n}": t for n, t in zoo.state(kind).items()}}, path)
    return open_checkpoint(path)


def test_there_and_back(kind, source, zoo, tmp_path):
    foreign = convert(source, tmp_path / "foreign.safetensors", naming=other_naming(kind))
    assert load_file(foreign).keys() == zoo.foreign_state(kind).keys()
    checkpoint = open_checkpoint(foreign)
    assert checkpoint.naming is other_naming(kind)
    back = load_file(convert(checkpoint, tmp_path / "back.safetensors", naming=Naming.ORIGINAL))
    want = zoo.state(kind)
    assert back.keys() == want.keys()
    assert all(back[name].equal(tensor) for name, tensor in want.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_dtype(dtype, kind, source, zoo, tmp_path):
    written = load_file(convert(source, tmp_path / "x.safetensors", dtype=dtype))
    for name, tensor in zoo.state(kind).items():
        assert written[name].equal(tensor.to(dtype or tensor.dtype))


def test_shards(kind, source, zoo, tmp_path):
    total = sum(t.nbytes for t in zoo.state(kind).values())
    index = convert(source, tmp_path / "out", shard_bytes=total // 3)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert index.name == "model.safetensors.index.json"
    assert len(files) >= 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert json.loads(index.read_text())["metadata"]["total_size"] == total
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, tensor in zoo.state(kind).items():
        assert checkpoint.read(name).equal(tensor)


def test_one_file_where_one_is_enough(source, tmp_path):
    naming = Naming.DIFFUSERS if source.kind is not Kind.TEXT_ENCODER else Naming.TRANSFORMERS
    path = convert(source, tmp_path / "out", naming=naming)
    stem = "diffusion_pytorch_model" if naming is Naming.DIFFUSERS else "model"
    assert path == tmp_path / "out" / f"{stem}.safetensors"


@torch.no_grad()
def test_diffusers_loads_what_is_written(zoo, tmp_path):
    """diffusers' own VAE, filled from the converted file, gives the same latents as ours."""
    from diffusers import AutoencoderKLWan

    save_file(zoo.state(Kind.VAE), tmp_path / "vae.safetensors")
    path = convert(open_checkpoint(tmp_path / "vae.safetensors"), tmp_path / "out", naming=Naming.DIFFUSERS)
    config = zoo.configs[Kind.VAE]
    theirs = AutoencoderKLWan(base_dim=config.base_dim, num_res_blocks=config.num_res_blocks).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    pixels = torch.rand(1, 3, 1, 32, 48) * 2 - 1
    ours = zoo.model(Kind.VAE)
    mean = theirs.encode(pixels).latent_dist.mean
    scale = (
        torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1),
        torch.tensor(config.latents_std).view(1, -1, 1, 1, 1),
    )
    torch.testing.assert_close(ours.encode_frame(pixels), (mean - scale[0]) / scale[1], atol=1e-4, rtol=1e-4)


def test_metadata_is_kept(zoo, tmp_path):
    metadata = {"latents_mean": json.dumps([0.5] * 16), "latents_std": json.dumps([2.0] * 16)}
    save_file(zoo.state(Kind.VAE), tmp_path / "vae.safetensors", metadata=metadata)
    path = convert(open_checkpoint(tmp_path / "vae.safetensors"), tmp_path / "out")
    checkpoint = open_checkpoint(path)
    assert checkpoint.source.metadata() == metadata | {"format": "pt"}
    assert checkpoint.config.latents_mean == (0.5,) * 16


def test_refusals(source, kind, zoo, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="--force"):
        convert(source, target)
    assert target.read_bytes() == b"precious"
    convert(source, target, force=True)
    assert target.stat().st_size > 100
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        convert(source, tmp_path / "x.pt")
    wrong = Naming.TRANSFORMERS if kind is not Kind.TEXT_ENCODER else Naming.DIFFUSERS
    with pytest.raises(WeightsError, match=f"has no {wrong} names; expected original"):
        convert(source, tmp_path / "y.safetensors", naming=wrong)
    assert not (tmp_path / "y.safetensors").exists()


def test_nan_leaves_no_file(zoo, tmp_path):
    state = zoo.state(Kind.TEXT_ENCODER)
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(WeightsError, match=r"NaN or Inf in norm\.weight"):
        convert(open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_unwritable_target(source, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be made"):
        convert(source, tmp_path / "file" / "x.safetensors")


def test_unknown_tensors(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "in.safetensors")
    with pytest.raises(WeightsError, match="unknown tensors"):
        convert(open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "out.safetensors")
