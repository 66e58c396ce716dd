"""Any bytes at all give a job or a ScriptError with file and line, one line per finding: over 2,000 inputs."""

import io
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wanrt.errors import ScriptError
from wanrt.script import RenderJob, build_job, read_script

FINDING = re.compile(r"<stdin>:[1-9]\d*: \S[^\n]*")
MANY = settings(max_examples=700, suppress_health_check=list(HealthCheck))

VALID = b"""
title    = "Ball over the bay"
preset   = "wan-tiny"
seed     = 7
size     = "224x128"          # width x height
fps      = 16
duration = "5s"
steps    = [1000, 937, 833, 625]
anchor   = "anchor-only"
window   = 3
bias     = 0.5
codec    = "h264"
quality  = "crf=18"

[[scene]]
prompt   = "a red ball bouncing over a blue night sky"
duration = "3s"

[[scene]]
prompt     = { "a green star spinning" = 0.7, "a sunset" = 0.3 }
transition = { over = "0.5s", curve = "slerp" }
chunks     = 2
"""


def job_or_findings(raw: bytes) -> RenderJob | list[str]:
    try:
        job = build_job(read_script("-", io.BytesIO(raw)))
    except ScriptError as bad:
        lines = str(bad).split("\n")
        assert all(FINDING.fullmatch(line) for line in lines), lines
        assert all(line.isprintable() for line in lines)
        assert all(int(line.split(":")[1]) <= raw.count(b"\n") + 1 for line in lines)
        return lines
    assert 0 < job.frames <= 24 * 3600 * job.fps
    for chunk in (0, 1, job.chunks - 1):
        at = job.timeline.at(chunk)
        assert sum(weight for _, weight in at.prompts) == pytest.approx(1)
        assert 0 < at.blend_fraction <= 1
    return job


@MANY
@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
    )
)
def test_random_bytes(raw):
    job_or_findings(raw)


@st.composite
def mutations(draw):
    """The valid file with pieces cut, doubled, moved or replaced."""
    raw = VALID
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        b = min(b, a + draw(st.sampled_from([0, 1, 2, 8, 40, 400])))
        new = draw(
            st.one_of(
                st.just(b""), st.just(raw[a:b] * 2), st.binary(max_size=4),
                st.sampled_from([b'"', b"'", b'"""', b"[", b"]]", b"{", b"}", b"=", b"\n", b"#", b"-", b"0", b"nan",
                                 b"inf", b"1e999", b"9" * 40, b"true", b"[[scene]]\n", b"\xff", b"\x00", b".", b",",
                                 b"\\", b"\r"]),
            )
        )  # fmt: skip
        raw = raw[:a] + new + raw[b:]
    return raw


@MANY
@given(mutations())
def test_mutated_files(raw):
    job_or_findings(raw)


keys = st.sampled_from(
    ["title", "preset", "seed", "size", "fps", "duration", "chunks", "steps", "anchor", "window", "bias", "codec",
     "quality", "scene", "prompt", "transition", "over", "curve", "kind", "promt", "topology", "x"]
)  # fmt: skip
texts = st.sampled_from(
    ["", " ", "5s", "0s", "1ms", "25h", "1m30s", "cut", "slerp", "lerp", "224x128", "1x1", "99999x99999", "30000/1001",
     "1/0", "h264", "latent", "anchor-only", "wan-tiny", "krea-14b", "longlive-1.3b", "../x", "a/b.toml", "crf=18",
     "model", "a red ball", "\u200b", "é" * 300]
)  # fmt: skip
scalars = st.one_of(
    texts.map(lambda t: f'"{t}"'),
    st.integers().map(str),
    st.integers(-3, 20).map(str),
    st.sampled_from(
        [
            "1e308",
            "-0.0",
            "nan",
            "inf",
            "0.5",
            "1_000",
            "0x" + "f" * 60,
            "true",
            "false",
            "1979-05-27",
            "07:32:00",
        ]
    ),
    st.floats(0, 1, allow_subnormal=False).map(lambda x: f"{x:.6f}"),
)
tables = st.dictionaries(st.one_of(keys, texts.map(lambda t: f'"{t}"')), scalars, max_size=3).map(
    lambda d: "{" + ", ".join(f"{k} = {v}" for k, v in d.items()) + "}"
)
lists = st.lists(st.one_of(scalars, tables), max_size=4).map(lambda v: "[" + ", ".join(v) + "]")
values = st.one_of(scalars, scalars, tables, lists)
bodies = st.dictionaries(keys, values, max_size=4).map(lambda d: [f"{k} = {v}" for k, v in d.items()])
scene_lines = st.one_of(
    bodies, bodies.map(lambda b: [line for line in b if "prompt" not in line] + ['prompt = "x"'])
)


@st.composite
def documents(draw):
    """TOML that is nearly always well formed, with tables, keys and values that may or may not belong."""
    lines = draw(bodies)
    for body in draw(st.lists(scene_lines, max_size=4)):
        lines += [
            draw(st.sampled_from(["[[scene]]", "[[scene]]", "[[scene]]", "[scene]", "[[other]]"])),
            *body,
        ]
    return "\n".join(lines).encode()


@MANY
@given(documents())
@example('[[scene]]\ntransition = {"\u200b" = ""}'.encode())  # a key that nobody sees
def test_structured_tables(raw):
    job_or_findings(raw)


SETTINGS = {
    "seed": st.integers(0, 2**63 - 1),
    "size": st.sampled_from(['"224x128"', "[64, 32]", '"832x480"']),
    "fps": st.sampled_from(["16", "1", "240", '"30000/1001"', "23.976"]),
    "anchor": st.sampled_from(['"latent"', '"overlap"', '"decode-all"', '"first-frame"']),
    "window": st.integers(1, 12),
    "bias": st.floats(0.01, 1).map(lambda x: f"{x:.3f}"),
    "steps": st.sampled_from(["1", "4", "50", "[1000]", "[1000, 500.5]"]),
    "codec": st.sampled_from(['"h264"', '"hevc"', '"av1"']),
    "quality": st.sampled_from(["0", "100", '"crf=63"']),
}


@settings(MANY, max_examples=200)
@given(st.fixed_dictionaries({}, optional=SETTINGS), st.lists(st.integers(13, 400), min_size=1, max_size=9))
def test_valid_files_are_accepted(settings, lengths):
    lines = [f"{key} = {value}" for key, value in settings.items()]
    for seconds in lengths:  # of 13 s and more: at one frame a second each scene surely has a chunk
        lines += ["[[scene]]", 'prompt = "x"', f"duration = {seconds}"]
    job = job_or_findings("\n".join(lines).encode())
    assert isinstance(job, RenderJob), job
    assert len(job.timeline.scenes) == len(lengths)
