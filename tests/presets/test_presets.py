"""Every file in presets/ is one or the other: a model with sound numbers, or a prompt file that makes a job."""

import json
from importlib import resources
from pathlib import Path

import pytest

from wanrt.errors import ScriptError, UsageError
from wanrt.script import build_job, demo_names, load_preset, preset_names, read_script
from wanrt.script.describe import describe, listing
from wanrt.script.preset import CacheKind
from wanrt.tiny import captions

FOLDER = Path(str(resources.files("wanrt_presets")))


def test_every_file_is_a_model_or_a_demo():
    files = {path.stem for path in FOLDER.glob("*.toml")}
    assert files == set(preset_names()) | set(demo_names())
    assert not set(preset_names()) & set(demo_names())
    assert {"krea-14b", "self-forcing-1.3b", "longlive-1.3b", "wan-tiny"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_models(name):
    preset = load_preset(name)
    assert preset.name == name
    assert preset.steps[0] == 1000
    assert all(a > b > 0 for a, b in zip(preset.steps, preset.steps[1:], strict=False))
    assert preset.transformer.text_dim == preset.text.dim
    assert preset.transformer_config().dim == preset.transformer.dim
    assert preset.text_config().vocab == preset.text.vocab


@pytest.mark.parametrize("name", preset_names())
def test_vae_configs(name):
    pytest.importorskip("wanrt.models.vae")
    preset = load_preset(name)
    if preset.vae.kind == "wan":
        assert preset.vae_config().z_dim == 16


@pytest.mark.parametrize("name", demo_names())
def test_demos(name):
    job = build_job(read_script(name))
    smaller = (
        "wan-tiny was made for 224x128; 160x96 may look worse",
    )  # for two processor cores, and says so
    assert job.notes == (smaller if name == "demo-live" else ())  # no other warnings from what we ship
    assert job.title


@pytest.mark.parametrize("name", demo_names())
def test_demos_say_what_the_embedded_model_knows(name):
    job = build_job(read_script(name))
    if job.preset.weights.embedded:
        words = {word for prompt in job.timeline.prompts() for word in prompt.lower().split()}
        assert words <= set(captions.vocabulary())


def test_the_embedded_model_says_what_it_draws():
    about = describe("wan-tiny").replace("\n", " ")
    for table in (captions.SHAPE_WORDS, captions.COLOUR_WORDS, captions.MOTION_WORDS):
        assert [name for name in table if name not in about] == []


def test_sizes_equal_the_published_checkpoints():
    """Facts of Wan2.1's configurations (wan/configs at 9737cba) and of the causal fine-tunes' caches."""
    big, small = load_preset("krea-14b"), load_preset("self-forcing-1.3b")
    assert (big.transformer.dim, big.transformer.ffn_dim, big.transformer.num_layers) == (5120, 13824, 40)
    assert (small.transformer.dim, small.transformer.ffn_dim, small.transformer.num_layers) == (
        1536,
        8960,
        30,
    )
    assert (
        big.transformer.dim // big.transformer.num_heads
        == small.transformer.dim // small.transformer.num_heads
        == 128
    )
    assert small.cache.window + small.chunk == 21
    sink = load_preset("longlive-1.3b").cache
    assert (sink.policy, sink.sink, sink.window + 3) == (CacheKind.SINK, 3, 12)


def test_unwarped_lists_are_warped():
    """Self-Forcing's utils/scheduler.py at 33593df: shift 5 of 1000 equal steps, read at 1000 - t."""
    sigmas = [1 - i / 1000 for i in range(1000)]
    table = [1000 * 5 * s / (1 + 4 * s) for s in sigmas]
    assert load_preset("self-forcing-1.3b").steps == pytest.approx(
        [table[1000 - t] for t in (1000, 750, 500, 250)]
    )


def test_tensor_parallel_sizes_of_the_embedded_model():
    shape = load_preset("wan-tiny").transformer
    assert shape.num_heads % 4 == shape.ffn_dim % 4 == 0


def test_a_preset_from_a_path(tmp_path):
    text = (FOLDER / "krea-14b.toml").read_text().replace('name  = "krea-14b"', 'name = "mine"')
    (tmp_path / "mine.toml").write_text(text)
    assert load_preset(tmp_path / "mine.toml").name == "mine"
    job = build_job(read_script("x"), {"preset": str(tmp_path / "mine.toml")})
    assert job.preset.name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("dim        = 5120", "dim = 0", "transformer.dim: got 0; input should be greater than 0"),
        ("num_heads  = 40", "num_heads = 7", "5120 / 7 is not"),
        ("[cache]", "[cash]", "cash is unknown: did you mean cache?"),
        ('policy = "recompute"', 'policy = "sink"', 'sink > 0 with policy = "sink"'),
        ("steps  = [1000, 937, 833, 625]", "steps = [900]", "falling timesteps from 1000"),
        ("fps   = 16", "fps = 0", "frames per second from 1 to 240"),
        ('kind  = "model"', "", 'expected kind = "model"'),
        ('name  = "krea-14b"', "", "name is missing"),
    ],
)
def test_wrong_presets(tmp_path, old, new, says):
    text = (FOLDER / "krea-14b.toml").read_text()
    assert old in text
    file = tmp_path / "p.toml"
    file.write_text(text.replace(old, new))
    with pytest.raises(ScriptError) as caught:
        load_preset(file)
    assert says in str(caught.value)
    assert all(line.startswith(f"{file}:") for line in str(caught.value).splitlines())


@pytest.mark.parametrize("name", ["krea", "", "../krea-14b", "x" * 5000, "a\0b", "krea-14b.toml/"])
def test_unknown_presets(name):
    with pytest.raises(UsageError):
        load_preset(name)


def test_descriptions():
    assert "krea-14b" in listing()
    assert set(json.loads(listing(as_json=True))) == {"models", "demos"}
    text = describe("krea-14b")
    assert "40 heads of 128" in text
    assert "1000, 937, 833, 625" in text
    assert json.loads(describe("krea-14b", as_json=True))["transformer"]["dim"] == 5120
