import pytest

from wanrt.pipeline.context import (
    AnchorPolicy,
    Head,
    chunks_for,
    context_plan,
    first_pixel_frame,
    latents_for,
    latents_kept,
    pixel_frames,
)

WINDOWS = range(1, 13)
ENCODING = [AnchorPolicy.DECODE_ALL, AnchorPolicy.OVERLAP, AnchorPolicy.ANCHOR_ONLY]


class PublicServer:
    """The public servers' bookkeeping, with labels instead of tensors; nothing is dropped."""

    def __init__(self, window):
        self.window, self.latents, self.pixels = window, [], []

    def context(self):
        if not self.latents:
            return []
        if len(self.latents) - 3 < self.window:
            if self.window == 1:
                return self.latents[:1]
            return self.latents[:1] + self.latents[1:][-self.window + 1 :]
        newest = self.latents[-self.window + 1 :] if self.window > 1 else []
        oldest_frame = self.pixels[-(1 + (self.window - 1) * 4) :][0]
        return [f"anchor of {oldest_frame}", *newest]

    def make(self):
        for index in range(len(self.latents), len(self.latents) + 3):
            self.latents.append(f"z{index}")
            self.pixels += [f"z{index}.{k}" for k in range(1 if index == 0 else 4)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("policy", ENCODING)
def test_matches_the_public_servers(window, policy):
    server = PublicServer(window)
    for chunk in range(12):
        plan = context_plan(chunk, window, policy)
        got = [f"z{i}" for i in plan.latents]
        if plan.anchor is not None:
            got[0] = f"anchor of z{plan.anchor}.3"
        assert got == server.context()
        assert plan.frames == min(3 * chunk, window)
        server.make()


@pytest.mark.parametrize("window", WINDOWS)
def test_latent_policy_has_the_raw_latent_in_the_anchors_place(window):
    for chunk in range(12):
        encoded = context_plan(chunk, window, AnchorPolicy.ANCHOR_ONLY)
        raw = context_plan(chunk, window, AnchorPolicy.LATENT)
        assert raw.latents == encoded.latents
        assert raw.head is Head.LATENT
        assert raw.anchor is None


@pytest.mark.parametrize("window", WINDOWS)
def test_first_frame_policy_keeps_the_first_latent_for_good(window):
    for chunk in range(1, 12):
        plan = context_plan(chunk, window, AnchorPolicy.FIRST_FRAME)
        assert plan.latents[0] == 0
        assert plan.anchor is None
        assert plan.latents[1:] == context_plan(chunk, window, AnchorPolicy.LATENT).latents[1:]


@pytest.mark.parametrize(("window", "decodes"), [(1, 3), (2, 2), (3, 1), (4, 0), (5, 0), (6, 0)])
def test_decodes_on_the_path(window, decodes):
    """Window 1 hangs on the newest chunk's last latent, 2 on its middle, 3 on its first, 4..6 on
    none.
    """
    for chunk in range(4, 9):
        anchor = context_plan(chunk, window, AnchorPolicy.ANCHOR_ONLY).anchor
        assert max(0, anchor - 3 * (chunk - 1) + 1) == decodes


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("policy", list(AnchorPolicy))
def test_kept_latents_suffice_and_do_not_grow(window, policy):
    for chunk in range(14):
        kept = latents_kept(chunk, window, policy)
        assert set(context_plan(chunk, window, policy).latents) <= kept
        assert latents_kept(chunk + 1, window, policy) <= kept | {3 * chunk, 3 * chunk + 1, 3 * chunk + 2}
        assert len(kept) <= window + 3


def test_pixel_counts():
    frames = []
    for latent in range(20):
        assert first_pixel_frame(latent) == len(frames)
        assert pixel_frames(latent) == len(frames)
        frames += [latent] * (1 if latent == 0 else 4)
    for count in range(1, len(frames)):
        needed = frames[count - 1] + 1
        assert latents_for(count) == needed
        assert chunks_for(count) == -(-needed // 3)
    assert [chunks_for(n) for n in (1, 9, 10, 21, 22, 80)] == [1, 1, 2, 2, 3, 7]
