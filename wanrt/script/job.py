"""What to make, resolved: no defaults left to look up, nothing left to check."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from wanrt.script.preset import Preset
from wanrt.script.timeline import Timeline, chunks_for

ANCHORS = ("decode-all", "overlap", "anchor-only", "latent", "first-frame")
PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")
# values of wanrt.models.attention.AttentionBackend
ATTENTIONS = ("auto", "sdpa", "cudnn", "flash", "fa4", "hopper", "triton", "math")
CODECS = ("h264", "hevc", "av1", "vp9")


@dataclass(frozen=True)
class RenderJob:
    """One video to make. `frames` is the exact number to deliver; None goes on until stopped.

    Timesteps in `steps` are warped (as the model sees them), from 1000 down, the final 0 left out. `window`
    is in latent frames, `width` and `height` in pixels, `weights` a directory or None for the default places.
    `notes` are one-line remarks about the file or the flags that the user should read.
    """

    preset: Preset
    timeline: Timeline
    seed: int
    width: int
    height: int
    fps: Fraction
    frames: int | None
    steps: tuple[float, ...]
    window: int
    bias: float
    anchor: str
    topology: str = "single"
    precision: str = "auto"
    attention: str = "auto"
    device: str = "auto"
    weights: Path | None = None
    random_weights: bool = False
    output: Path | None = None
    codec: str | None = None
    quality: float | str | None = None  # 0 to 100, or "crf=N"
    force: bool = False
    stats: Path | None = None
    trace: Path | None = None
    title: str = ""
    notes: tuple[str, ...] = ()

    @property
    def chunks(self) -> int | None:
        """How many chunks it takes, None when endless."""
        return None if self.frames is None else chunks_for(self.frames)

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a latent frame: (H/16, W/16)."""
        return self.height // 16, self.width // 16

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns: (H/8, W/8)."""
        return self.height // 8, self.width // 8
