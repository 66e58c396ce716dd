"""Against diffusers' WanTransformer3DModel and the public checkpoints' tensor lists."""

import re

import pytest
import torch

from wanrt.models.transformer import WAN_1_3B, WAN_14B, Pass, WanTransformer

TOLERANCE = 1e-4  # of the output's scale; diffusers makes the time embedding's angles in fp32

# ours (original Wan2.1) -> diffusers
RENAMES = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation", "scale_shift_table"),
    (r"\.modulation", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\.(weight|bias)", r".to_\1.\2"),
    (r"\.o\.(weight|bias)", r".to_out.0.\1"),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)


def diffusers_name(name):
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def diffusers_twin(model):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan", reason="needs diffusers")
    c = model.config
    twin = wan.WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
    )
    state = {diffusers_name(name): p for name, p in model.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@pytest.fixture
def case(make_transformer, make_cache):
    model = make_transformer(num_layers=3, num_heads=3, dim=60)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    latents, embeddings = draw(2, 16, 4, 6, 10), draw(2, 7, 20)
    cache = make_cache(model, grid=(3, 5), batch=2, chunk=4)

    def ours(t):
        text = model.embed_text(embeddings)
        return model(latents, t.float(), text, cache, pass_=Pass.DENOISE)

    return ours, lambda t: diffusers_twin(model)(latents, t, embeddings, return_dict=False)[0]


def assert_close(got, expected):
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"relative error {error:.2e} > {TOLERANCE:.0e}"


@torch.no_grad()
def test_full_forward_equals_diffusers(case):
    ours, theirs = case
    assert_close(ours(torch.tensor([937.0, 250.0])[:, None].expand(2, 4)), theirs(torch.tensor([937, 250])))


@torch.no_grad()
def test_per_frame_timesteps_equal_diffusers(case):
    ours, theirs = case
    t = torch.tensor([[0, 625, 833, 1000], [1000, 3, 500, 0]])
    assert_close(ours(t), theirs(t.repeat_interleave(15, dim=1)))


def layer_layout(dim, ffn_dim):
    """Names and shapes of one block of a Wan2.1 text-to-video checkpoint."""
    shapes = {"modulation": (1, 6, dim), "norm3.weight": (dim,), "norm3.bias": (dim,)}
    for attention in ("self_attn", "cross_attn"):
        for linear in "qkvo":
            shapes[f"{attention}.{linear}.weight"] = (dim, dim)
            shapes[f"{attention}.{linear}.bias"] = (dim,)
        shapes[f"{attention}.norm_q.weight"] = shapes[f"{attention}.norm_k.weight"] = (dim,)
    shapes |= {"ffn.0.weight": (ffn_dim, dim), "ffn.0.bias": (ffn_dim,)}
    return shapes | {"ffn.2.weight": (dim, ffn_dim), "ffn.2.bias": (dim,)}


def checkpoint_layout(dim, ffn_dim, layers):
    """The tensor list of Wan-AI/Wan2.1-T2V-14B and -1.3B, original names."""
    shapes = {
        "patch_embedding.weight": (dim, 16, 1, 2, 2),
        "text_embedding.0.weight": (dim, 4096),
        "text_embedding.2.weight": (dim, dim),
        "time_embedding.0.weight": (dim, 256),
        "time_embedding.2.weight": (dim, dim),
        "time_projection.1.weight": (6 * dim, dim),
        "head.head.weight": (64, dim),
    }
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer_layout(dim, ffn_dim).items()}
    return shapes | {"head.modulation": (1, 2, dim)}


@pytest.mark.parametrize(
    ("config", "sizes", "parameters"),
    [(WAN_14B, (5120, 13824, 40), 14_288_491_584), (WAN_1_3B, (1536, 8960, 30), 1_418_996_800)],
)
def test_shapes_equal_public_checkpoints(config, sizes, parameters):
    with torch.device("meta"):
        model = WanTransformer(config)
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == checkpoint_layout(*sizes)
    assert sum(p.numel() for p in model.parameters()) == parameters
