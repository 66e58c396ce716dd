"""Which latents condition a chunk, and what stands in the window's first place. Pure arithmetic, no tensors.

Latent frames are counted from 0 over the whole video; chunk i makes latents 3i..3i+2. Rule, from
krea-ai/realtime-video release_server.py (`get_clean_context_frames`) at acf4b7b and daydreamlive/scope
krea_realtime_video/blocks/recompute_kv_cache.py at 68b0f95:

    chunk 0                       no context
    (chunks made - 1) 3 < window  the video's first latent + the last window - 1 of the others, as far as made
    from then on                  an anchor in the place of latent made - window, + the last window - 1

The context takes positions 0..F-1 and the chunk follows it, so F = min(latents made, window) tells every
shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PIXELS_PER_LATENT = 4  # in time; the very first latent of a video decodes to one frame
CHUNK_LATENTS = 3


class Head(StrEnum):
    """What stands in the first place of a context."""

    LATENT = "latent"  # a latent as the transformer made it
    ANCHOR = "anchor"  # the first-frame encoding of the last pixel frame that this latent decodes to


class AnchorPolicy(StrEnum):
    """What stage 0 does when a chunk's latents arrive; the first three give the same video bit for bit.

    decode-all   decode everything, encode the anchor, deliver the frames, submit the next chunk
    overlap      decode everything, encode the anchor, submit, deliver
    anchor-only  decode up to the anchor's latent, encode it, submit, decode the rest, deliver
    latent       submit at once with the raw latent in the anchor's place (glitches: an experiment)
    first-frame  submit at once with the video's first latent in the anchor's place for good
    """

    DECODE_ALL = "decode-all"
    OVERLAP = "overlap"
    ANCHOR_ONLY = "anchor-only"
    LATENT = "latent"
    FIRST_FRAME = "first-frame"

    @property
    def encodes(self) -> bool:
        """Whether the VAE lies on the path from one chunk to the next."""
        return self in (AnchorPolicy.DECODE_ALL, AnchorPolicy.OVERLAP, AnchorPolicy.ANCHOR_ONLY)


@dataclass(frozen=True)
class ContextPlan:
    """The context of one chunk: absolute latent indices, oldest first, and what stands in the first place.

    With `head` = `Head.ANCHOR` the first index names the latent that the anchor replaces.
    """

    latents: tuple[int, ...]
    head: Head = Head.LATENT

    @property
    def frames(self) -> int:
        """Latent frames of context; also the chunk's first position."""
        return len(self.latents)

    @property
    def anchor(self) -> int | None:
        """The latent whose last pixel frame must be encoded as the anchor, if there is one."""
        return self.latents[0] if self.head is Head.ANCHOR else None


def context_plan(
    chunk: int, window: int, policy: AnchorPolicy, chunk_latents: int = CHUNK_LATENTS
) -> ContextPlan:
    """The context of chunk number `chunk` (from 0) with a window of `window` latent frames."""
    made = chunk * chunk_latents
    if chunk == 0:
        return ContextPlan(())
    recent = range(max(1, made - window + 1), made)
    if made - chunk_latents < window or policy is AnchorPolicy.FIRST_FRAME:
        return ContextPlan((0, *recent))
    head = Head.ANCHOR if policy.encodes else Head.LATENT
    return ContextPlan((made - window, *recent), head)


def latents_kept(
    chunk: int, window: int, policy: AnchorPolicy, chunk_latents: int = CHUNK_LATENTS
) -> frozenset[int]:
    """Of the latents made before `chunk`, those that this chunk's context or a later one's may still need."""
    made = chunk * chunk_latents
    needs_first = policy is AnchorPolicy.FIRST_FRAME or made - chunk_latents < window
    recent = range(max(0, made - window), made)
    return frozenset(recent) | (frozenset({0}) if needs_first and made else frozenset())


def first_pixel_frame(latent: int) -> int:
    """Index of the first pixel frame that `latent` decodes to: 0, 1, 5, 9, ..."""
    return 0 if latent == 0 else 1 + (latent - 1) * PIXELS_PER_LATENT


def pixel_frames(latents: int) -> int:
    """Pixel frames that the first `latents` latent frames of a video decode to: 0, 1, 5, 9, ..."""
    return first_pixel_frame(latents) if latents else 0


def chunks_for(frames: int, chunk_latents: int = CHUNK_LATENTS) -> int:
    """Chunks needed for `frames` pixel frames: 9 fit in one, 21 in two, 33 in three."""
    return max(1, -(-latents_for(frames) // chunk_latents))


def latents_for(frames: int) -> int:
    """Latent frames that must be decoded to have `frames` pixel frames."""
    return 1 + max(0, -(-(frames - 1) // PIXELS_PER_LATENT)) if frames > 0 else 0
