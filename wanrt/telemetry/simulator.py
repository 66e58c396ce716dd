"""The pipeline as five numbers: given what each stage costs, the period and the frame rate of every policy.

An event simulation of two devices, the mesh and stage 0 (one and the same without PP1), each doing one thing at a
time in order. It shares its rules with `wanrt.pipeline.loop`: chunk N+1 starts when the mesh is free and the anchor
of chunk N is known; display work of a chunk ends before the next anchor is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHUNK_LATENTS = 3
CHUNK_FRAMES = 12
FIRST_CHUNK_FRAMES = 9
POLICIES = ("decode-all", "overlap", "anchor-only", "latent", "first-frame")


@dataclass(frozen=True)
class StageCosts:
    """What one chunk costs, in milliseconds.

    mesh: context pass and all denoising steps. decode: of one latent (four pixel frames). encode: of one anchor.
    convert: pixels to the encoder's format, and their way to the host. transfer: latents up and envelope down.
    """

    mesh: float
    decode: float
    encode: float
    convert: float = 0.0
    transfer: float = 0.0

    @classmethod
    def of_stats(cls, document: Mapping[str, Any]) -> StageCosts:
        """Costs measured by a run, from its `--stats` file.

        Raises `ValueError` when the document has no whole chunk of both stages.
        """
        stages = {stage["stage"]: stage["spans"] for stage in document["stats"]["stages"]}
        chunks = document["stats"]["chunks"]
        if not chunks or "mesh" not in stages or "stage0" not in stages:
            raise ValueError("stats without a whole chunk of mesh and stage0; record a run of a few chunks")
        mesh, stage0 = stages["mesh"], stages["stage0"]
        passes = [mesh[name] for name in ("context", "step", "commit") if name in mesh]
        return cls(
            mesh=sum(_total(spread) for spread in passes) / chunks,
            decode=_mean([stage0[name] for name in ("anchor-decode", "display-decode") if name in stage0]),
            encode=_mean([stage0["anchor-encode"]] if "anchor-encode" in stage0 else []),
            convert=_mean([stage0["convert"]] if "convert" in stage0 else []),
        )


def _total(spread: Mapping[str, Any]) -> float:
    """All of a span kind's time, from its median: one slow first chunk (compilation, warm-up) does not count."""
    return spread["count"] * spread["p50_ms"]


def _mean(spreads: list[Mapping[str, Any]]) -> float:
    count = sum(spread["count"] for spread in spreads)
    return sum(_total(spread) for spread in spreads) / count if count else 0.0


@dataclass(frozen=True)
class ChunkWork:
    """Stage 0's work on one chunk in milliseconds: before the next chunk may start, and after."""

    path: float
    display: float


def chunk_work(costs: StageCosts, policy: str, window: int = 3) -> ChunkWork:
    """What `policy` puts on the path to the next chunk.

    With anchor-only it is the decode of the latents up to the anchor's: 3, 2, 1 for windows 1, 2, 3, and nothing at
    all for wider ones, whose anchor lies in an older chunk and is encoded ahead.

    Raises `ValueError` for an unknown policy.
    """
    decode, whole = costs.decode, CHUNK_LATENTS * costs.decode
    if policy == "decode-all":
        return ChunkWork(whole + costs.encode + costs.convert, 0.0)
    if policy == "overlap":
        return ChunkWork(whole + costs.encode, costs.convert)
    if policy == "anchor-only":
        before = max(0, CHUNK_LATENTS + 1 - window)
        encode = costs.encode if before else 0.0
        path = before * decode + encode
        return ChunkWork(path, whole + costs.encode - path + costs.convert)
    if policy in ("latent", "first-frame"):
        return ChunkWork(0.0, whole + costs.convert)
    raise ValueError(f"anchor policy {policy!r}: expected one of {', '.join(POLICIES)}")


@dataclass(frozen=True)
class Prediction:
    """A steady state. Times in milliseconds, shares 0..1; fps are pixel frames per second.

    path: from the mesh's last step to its next chunk (its bubble). bound: what the period is made of.
    """

    period: float
    fps: float
    fps_without_vae: float
    bubble: float
    mesh_share: float
    stage0_share: float
    first_frame: float
    bound: str


def simulate(
    costs: StageCosts, policy: str, *, pp1: bool = True, window: int = 3, chunks: int = 48
) -> Prediction:
    """Run `chunks` chunks and read the steady state off their second half.

    pp1: stage 0 has a device of its own; without it, it shares the mesh's, and their work adds up.

    Raises `ValueError` for an unknown policy.
    """
    work = chunk_work(costs, policy, window)
    mesh_free = stage0_free = ready = 0.0
    starts, ends, shown = [], [], []
    for _ in range(chunks):
        start = max(mesh_free, ready)
        end = start + costs.mesh
        begun = max(end + costs.transfer / 2, stage0_free)
        ready = end if work.path == 0 else begun + work.path + costs.transfer / 2
        stage0_free = begun + work.path + work.display
        mesh_free = end if pp1 else max(end, stage0_free)
        starts.append(start)
        ends.append(end)
        shown.append(stage0_free)
    half = chunks // 2
    period = (shown[-1] - shown[half]) / (chunks - 1 - half)
    bubbles = [after - before for before, after in zip(ends[half:-1], starts[half + 1 :], strict=True)]
    return _prediction(costs, work, period, sum(bubbles) / len(bubbles), shown[0], pp1)


def _prediction(
    costs: StageCosts, work: ChunkWork, period: float, bubble: float, first: float, pp1: bool
) -> Prediction:
    stage0 = work.path + work.display
    if not pp1:
        bound = "mesh and stage 0 on one device, one after the other"
    elif stage0 > costs.mesh + work.path:
        bound = "stage 0: its decoding takes longer than the mesh's chunk"
    else:
        bound = "the mesh and the path to its next anchor" if work.path else "the mesh"
    return Prediction(
        period=period,
        fps=CHUNK_FRAMES * 1000 / period,
        fps_without_vae=CHUNK_FRAMES * 1000 / costs.mesh,
        bubble=bubble,
        mesh_share=min(1.0, costs.mesh / period),
        stage0_share=min(1.0, stage0 / period),
        first_frame=first,
        bound=bound,
    )
