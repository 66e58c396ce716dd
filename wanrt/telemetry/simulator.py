"""The pipeline as five numbers: given what each stage costs, the period and the frame rate of every policy.

An event simulation of two devices, the mesh and stage 0 (one and the same without PP1), each doing one thing at a
time in order. It shares its rules with `wanrt.pipeline.loop`: chunk N+1 starts when the mesh is free and the anchor
of chunk N is known; display work of a chunk ends before the next anchor is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wanrt.telemetry.quantiles import quantile
from wanrt.telemetry.spans import Span

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
    def of_stats(cls, document: Mapping[str, Any], *, beside: bool = False) -> StageCosts:
        """Costs measured by a run, from its `--stats` file.

        beside: display work ran beside the mesh's passes on one device, and lengthened them. A file says how long spans
        were and not when, so all of it is taken off the passes.

        Raises `ValueError` when the document has no whole chunk of both stages.
        """
        stages = {stage["stage"]: stage["spans"] for stage in document["stats"]["stages"]}
        chunks = document["stats"]["chunks"]
        if not chunks or "mesh" not in stages or "stage0" not in stages:
            raise ValueError("stats without a whole chunk of mesh and stage0; record a run of a few chunks")
        mesh, stage0 = stages["mesh"], stages["stage0"]
        passes = [mesh[name] for name in PASSES if name in mesh]
        half = {name: spread["p50_ms"] for name, spread in stage0.items()}
        costs = cls(
            # medians: one slow first chunk (compilation, warm-up) does not count
            mesh=sum(spread["count"] * spread["p50_ms"] for spread in passes) / chunks,
            decode=_first(half, *DECODES),
            encode=_first(half, "anchor-encode"),
            convert=_first(half, "convert"),
        )
        if not beside:
            return costs
        made = document["settings"]
        display = chunk_work(costs, made["anchor"], made["window"]).display
        return replace(costs, mesh=max(0.0, costs.mesh - display))

    @classmethod
    def of_chunks(
        cls, chunks: Mapping[int, Sequence[Span]], *, shared: bool, policy: str, window: int
    ) -> StageCosts:
        """Costs measured by the outermost spans of some steady chunks, made under `policy` with `window`.

        shared: mesh and stage 0 were on one device. Display work that ran beside the mesh's passes has then
        lengthened them, and they it: a stage's cost is that of its spans which ran beside no pass, where there are
        any (the last chunk's always do), and what the display work takes so is taken off the passes again.
        """
        spans = [[s for s in each if s.stage == "mesh" and s.name != "text"] for each in chunks.values()]
        stage0 = [s for each in chunks.values() for s in each if s.stage == "stage0"]
        half = _medians(stage0, [s for each in spans for s in each] if shared else [])
        alone = cls(0.0, _first(half, *DECODES), _first(half, "anchor-encode"), _first(half, "convert"))
        display = chunk_work(alone, policy, window).display
        beside = stage0 if shared else []
        mesh = quantile([_alone(passes, beside, display) for passes in spans], 0.5)
        return replace(alone, mesh=mesh)


PASSES = ("context", "step", "commit")
# A decode on the path to the next chunk runs alone; one for display may share its device with the mesh.
DECODES = ("anchor-decode", "display-decode")


def _first(values: Mapping[str, float], *names: str) -> float:
    """The first of `names` that was measured, or 0."""
    return next((values[name] for name in names if name in values), 0.0)


def _medians(stage0: Sequence[Span], passes: Sequence[Span]) -> dict[str, float]:
    """Milliseconds of stage 0's spans by name; of a name's that ran beside no pass, where there are any."""
    every: dict[str, list[float]] = {}
    apart: dict[str, list[float]] = {}
    for span in stage0:
        every.setdefault(span.name, []).append(span.duration_ns / 1e6)
        if not any(_overlap_ns(span, other) for other in passes):
            apart.setdefault(span.name, []).append(span.duration_ns / 1e6)
    return {name: quantile(values, 0.5) for name, values in (every | apart).items()}


def _alone(passes: Sequence[Span], beside: Sequence[Span], display: float) -> float:
    """Milliseconds of a chunk's passes, less the display work that ran in between, at most `display`."""
    total = sum(span.duration_ns for span in passes)
    overlap = sum(_overlap_ns(span, other) for span in passes for other in beside)
    return total / 1e6 - min(overlap / 1e6, display)


def _overlap_ns(a: Span, b: Span) -> int:
    """For how long both ran."""
    return max(0, min(a.end_ns, b.end_ns) - max(a.start_ns, b.start_ns))


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
