from __future__ import annotations

import pytest

from wanrt.errors import UsageError
from wanrt.parallel.topology import MeshKind, ModelShape, Topology, check, nearest, why_not

KREA = ModelShape(heads=40, ffn_dim=13824, frame_tokens=720)  # 14B at 576x320


@pytest.mark.parametrize(
    ("text", "kind", "mesh", "pp1", "vae", "devices"),
    [
        ("single", MeshKind.SINGLE, 1, False, 1, 1),
        ("tp=4", MeshKind.TP, 4, False, 1, 4),
        ("ulysses=5", MeshKind.ULYSSES, 5, False, 1, 5),
        ("pp1+tp=1", MeshKind.TP, 1, True, 1, 2),
        ("pp1+ulysses=4", MeshKind.ULYSSES, 4, True, 1, 5),
        ("pp1+tp=4+vae=4", MeshKind.TP, 4, True, 4, 8),
        ("tp=2+vae=2", MeshKind.TP, 2, False, 2, 2),
    ],
)
def test_every_form_parses_and_prints_back(text, kind, mesh, pp1, vae, devices):
    topology = Topology.parse(text)
    assert topology == Topology(kind, mesh, pp1, vae)
    assert str(topology) == text
    assert topology.devices == devices == len(topology.ranks())
    assert topology.distributed == (devices > 1)


BAD = [
    "",
    "tp",
    "tp=0",
    "tp=-1",
    "pp1",
    "pp1+single",
    "pp2+tp=2",
    "tp=2+vae=0",
    "single+vae=2",
    "TP=2",
    "tp=2+tp=2",
]


@pytest.mark.parametrize("text", [*BAD, "auto"])
def test_other_forms_are_refused(text):
    with pytest.raises(UsageError, match=r"expected single, tp=N, ulysses=N"):
        Topology.parse(text)


def test_roles():
    words = [f"{r.rank} {r.name}: {r.roles}" for r in Topology.parse("pp1+tp=2+vae=2").ranks()]
    assert words == [
        "0 stage0: stage 0, VAE part 0",
        "1 vae1: VAE part 1",
        "2 mesh0: mesh 0",
        "3 mesh1: mesh 1",
    ]
    words = [f"{r.rank} {r.name}: {r.roles}" for r in Topology.parse("ulysses=3+vae=2").ranks()]
    assert words == [
        "0 stage0: stage 0, mesh 0, VAE part 0",
        "1 mesh1: mesh 1, VAE part 1",
        "2 mesh2: mesh 2",
    ]


@pytest.mark.parametrize("text", ["single", "tp=8", "ulysses=5", "pp1+ulysses=4", "pp1+tp=4+vae=4"])
def test_valid_topologies_of_14b(text):
    check(Topology.parse(text), KREA, devices=8)


ODD = ModelShape(40, 13824, 1564)
SMALL = ModelShape(8, 64, 8, vae_lines=4)
REFUSED = [
    ("pp1+tp=5", KREA, 8, "13824 % 5 = 4 (ffn_dim), expected 0", "pp1+tp=4 or pp1+ulysses=5"),
    ("tp=3", KREA, None, "40 % 3 = 1 (heads), expected 0", "tp=2"),
    ("ulysses=5", ODD, None, "1564 % 5 = 4 (tokens of a latent frame), expected 0", "ulysses=4"),
    ("tp=4", KREA, 2, "4 devices > 2 on this machine", "tp=2"),
    ("pp1+tp=4", KREA, 4, "1 + 4 = 5 devices > 4 on this machine", "pp1+tp=2"),
    ("tp=2+vae=4", KREA, 8, "vae=4 > 2, the mesh's devices, which the VAE shares without pp1", "tp=2+vae=2"),
    ("pp1+tp=2+vae=4", KREA, 4, "4 + 2 = 6 devices > 4 on this machine", "pp1+tp=2+vae=2"),
    ("pp1+tp=2+vae=5", SMALL, None, "vae=5 > 4, the longer side of a latent", "pp1+tp=2+vae=4"),
    ("tp=2", KREA, 1, "2 devices > 1 on this machine", "single"),
]


@pytest.mark.parametrize(("text", "shape", "devices", "reason", "advice"), REFUSED)
def test_refusals_print_the_equation_and_the_nearest_valid_choice(text, shape, devices, reason, advice):
    with pytest.raises(UsageError) as error:
        check(Topology.parse(text), shape, devices)
    assert str(error.value) == f"topology {text}: {reason}; nearest valid: {advice}"


@pytest.mark.parametrize("text", ["tp=5", "tp=7", "ulysses=7", "ulysses=64", "pp1+tp=6+vae=3", "tp=9+vae=12"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_whatever_is_advised_is_valid(text, devices):
    for option in nearest(Topology.parse(text), KREA, devices):
        assert why_not(option, KREA, devices) is None
