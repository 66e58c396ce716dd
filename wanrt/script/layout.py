"""Scenes of a prompt file on the frame axis: exact starts, chunks, total length, and what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from wanrt.script.schema import PromptFile, SceneTable, Settings
from wanrt.script.source import Path
from wanrt.script.timeline import CHUNK_FRAMES, chunks_for, first_frame, nearest_chunk, to_frames
from wanrt.script.units import LONGEST

DEFAULT_SCENE = Fraction(5)  # seconds of a scene when neither it nor its file says


@dataclass
class Layout:
    """Where each scene starts (frames, chunks) and ends (exactly), the video's length, what is wrong."""

    fps: Fraction
    ends: list[Fraction] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    frames: int = 0
    findings: list[tuple[Path, str]] = field(default_factory=list)

    def seconds(self, frames: Fraction | int) -> str:
        """`frames` as people read time."""
        return f"{float(frames / self.fps):.3f}".rstrip("0").rstrip(".") + "s"


def lay_out(file: PromptFile, flags: Settings, fps: Fraction) -> Layout:
    """Place the scenes of `file`; a length in `flags` cuts the end or extends the last scene."""
    layout = Layout(fps)
    own = length(file, fps)
    share = _share(file, own, layout)
    at = Fraction(0)
    for scene in file.scene:
        layout.starts.append(to_frames(at / fps, fps))
        layout.chunks.append(nearest_chunk(layout.starts[-1]))
        at = _end(scene, at, layout.chunks[-1], share, fps)
        layout.ends.append(at)
    layout.frames = length(flags, fps) or own or max(1, to_frames(at / fps, fps))
    _check_scenes(file.scene, layout)
    _check_total(file, layout)
    return layout


def length(settings: Settings, fps: Fraction) -> int | None:
    """Frames that `duration` or `chunks` asks for, or None without either."""
    if settings.duration is not None:
        return max(1, to_frames(settings.duration, fps))
    return None if settings.chunks is None else first_frame(settings.chunks)


def _end(scene: SceneTable, at: Fraction, chunk: int, share: Fraction, fps: Fraction) -> Fraction:
    """The exact frame at which a scene that starts at `at`, in `chunk`, ends."""
    if scene.chunks is not None:
        return Fraction(first_frame(chunk + scene.chunks))
    return at + (share if scene.duration is None else scene.duration * fps)


def _share(file: PromptFile, own: int | None, layout: Layout) -> Fraction:
    """Frames of a scene without a length: an equal part of what the file's length leaves, else 5 seconds."""
    silent = [i for i, scene in enumerate(file.scene) if scene.duration is None and scene.chunks is None]
    if own is None or not silent:
        return DEFAULT_SCENE * layout.fps
    said = sum((_said(scene, layout.fps) for scene in file.scene), Fraction(0))
    if said < own:
        return (own - said) / len(silent)
    text = (
        f"scene {silent[0] + 1} has no duration and the others already fill the file's "
        f"{layout.seconds(own)}: give it one, or raise the file's duration"
    )
    layout.findings.append((("scene", silent[0]), text))
    return DEFAULT_SCENE * layout.fps


def _said(scene: SceneTable, fps: Fraction) -> Fraction:
    if scene.duration is not None:
        return scene.duration * fps
    return Fraction((scene.chunks or 0) * CHUNK_FRAMES)


def _check_scenes(scenes: Sequence[SceneTable], layout: Layout) -> None:
    chunk = layout.seconds(CHUNK_FRAMES)
    for i, scene in enumerate(scenes):
        start = layout.ends[i - 1] if i else Fraction(0)
        end = layout.ends[i] if i + 1 < len(scenes) else max(layout.ends[i], Fraction(layout.frames))
        took = end - start
        if i + 1 < len(scenes) and layout.chunks[i + 1] <= layout.chunks[i]:
            text = (
                f"scene {i + 1} lasts {layout.seconds(took)}, which no chunk shows: "
                f"give it at least {chunk}, the time of one chunk"
            )
            layout.findings.append((("scene", i, "duration"), text))
        _check_transition(i, scene, took, layout)


def _check_transition(i: int, scene: SceneTable, took: Fraction, layout: Layout) -> None:
    over = scene.transition.over * layout.fps if scene.transition else Fraction(0)
    if not over:
        return
    path = ("scene", i, "transition")
    if i == 0:
        text = "the first scene has nothing to blend from: leave it out"
        layout.findings.append((path, f"scene 1, transition: {text}"))
    elif over > took:
        text = f"got {layout.seconds(over)}; expected at most the scene's own {layout.seconds(took)}"
        layout.findings.append((path, f"scene {i + 1}, transition: {text}"))


def _check_total(file: PromptFile, layout: Layout) -> None:
    longest = max(Fraction(layout.frames), layout.ends[-1])
    if longest > LONGEST * layout.fps:
        key = next((k for k in ("duration", "chunks") if getattr(file, k) is not None), "scene")
        text = f"the video would last {float(longest / layout.fps) / 3600:.1f} hours; expected at most 24"
        layout.findings.append(((key,), text))


def unseen(layout: Layout) -> list[int]:
    """Scenes (from 0) that start after the last chunk of the video."""
    last = chunks_for(layout.frames)
    return [i for i, chunk in enumerate(layout.chunks) if chunk >= last]
