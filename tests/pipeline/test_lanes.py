"""The order that lanes promise, checked on a log of the calls."""

from contextlib import contextmanager

import pytest
import torch

from wanrt.errors import RunError
from wanrt.pipeline.lanes import Flag, OneLane, lanes_for


class LoggedLanes:
    """Lanes that only write down what was asked of them, with the lane that each decode ran in."""

    def __init__(self, apart=True):
        self.log, self.lane, self.apart = [], None, apart

    @contextmanager
    def _in(self, name):
        before, self.lane = self.lane, name
        yield
        self.lane = before

    def main(self):
        return self._in("main")

    def side(self):
        self.log.append("side")
        return self._in("side")

    def ahead(self):
        return self._in("ahead")

    def join(self):
        self.log.append("join")

    def mark(self):
        self.log.append("mark")

    def share(self, tensor):
        return tensor


@pytest.fixture
def logged(fake_pipeline, fakes):
    def run(apart=True, launch_on_submit=True, **settings):
        lanes = LoggedLanes(apart)

        class Vae(fakes[2]):
            def decode(self, latent, state):
                lanes.log.append(f"decode {lanes.lane}")
                return super().decode(latent, state)

            def encode_frame(self, pixels):
                lanes.log.append(f"encode {lanes.lane}")
                return super().encode_frame(pixels)

        class Denoiser(fakes[3]):
            def set_text(self, embedding):
                lanes.log.append(f"text {lanes.lane}")
                super().set_text(embedding)

            def denoise(self, latents, timestep):
                if timestep == 1000:
                    lanes.log.append(f"mesh {lanes.lane}")
                return super().denoise(latents, timestep)

        pipeline, _, _ = fake_pipeline(
            vae=Vae(), denoiser=Denoiser(), launch_on_submit=launch_on_submit, **settings
        )
        pipeline._lanes = pipeline._pixels._lanes = pipeline._pixels._codec._lanes = lanes
        encode = pipeline._prompts._encode

        def logged_encode(text):
            lanes.log.append(f"encode {text} {lanes.lane}")
            return encode(text)

        pipeline._prompts._encode = logged_encode
        list(pipeline.run())
        return lanes.log

    return run


PATH = ["mark", "join", "decode main", "encode main", "mark"]
DISPLAY = ["side", "decode side", "decode side"]


@pytest.mark.parametrize(
    ("settings", "steady"),
    [
        ({}, [*PATH, *DISPLAY, "mesh main"]),
        # on one stream the display would come before the mesh
        ({"apart": False}, [*PATH, "mesh main", *DISPLAY]),
        # launched when it is received
        ({"launch_on_submit": False}, ["mesh main", *PATH, *DISPLAY]),
    ],
)
def test_anchor_only(logged, settings, steady):
    """Main: anchor decode behind the last display, encode, next chunk. Side: the other two decodes, from the mark.

    They are queued before the next chunk's passes, whose launches may keep the host, unless both lanes are one.
    """
    log = [entry for entry in logged(frames=57, **settings) if not entry.startswith(("text", "encode b"))]
    # chunks 1, 2 and 3; the first has no anchor, the last no next
    assert " | ".join(log).count(" | ".join(steady)) == 3


@pytest.mark.parametrize("launch_on_submit", [True, False])
def test_a_prompt_waits_for_no_chunk(logged, launch_on_submit):
    """Encoded in the lane ahead, and with the mesh before the anchor of the chunk before is made."""
    log = logged(frames=57, launch_on_submit=launch_on_submit)
    assert log[:2] == ["encode a ahead", "text main"]
    changed = [i for i, entry in enumerate(log) if entry == "text main"][1:]
    assert [log[i + 1 : i + 3] for i in changed] == [["join", "decode main"]] * 3
    assert log.index("encode b ahead") == changed[0] - 1


@pytest.mark.parametrize("policy", ["latent", "first-frame"])
def test_without_an_anchor_the_mesh_never_waits_for_the_display(logged, policy):
    log = logged(policy=policy, frames=57)
    assert "join" not in log
    assert log.count("decode side") == 15


def test_wide_windows_leave_nothing_on_the_path(logged):
    log = logged(window=4, frames=57)
    assert "decode main" not in log
    assert "encode main" not in log
    assert log.count("encode side") == 2  # for chunks 3 and 4


def test_decode_all_has_one_lane(logged):
    log = logged(policy="decode-all", frames=57)
    assert "side" not in log
    assert log.count("decode main") == 15


def test_cpu_has_one_lane_and_flags_are_ready():
    assert isinstance(lanes_for(torch.device("cpu")), OneLane)
    flag = Flag(torch.tensor(False))
    assert flag.ready
    assert flag.wait() is False


class Never:
    """An event that the device never reaches."""

    def query(self):
        return False


def test_a_flag_that_never_comes_is_an_error():
    flag = Flag(torch.tensor(True))
    flag._event = Never()
    with pytest.raises(RunError, match=r"for 0.01 s"):
        flag.wait(limit_s=0.01)

    def dead():
        raise RunError("mesh1 failed")

    with pytest.raises(RunError, match="mesh1"):
        flag.wait(dead)
