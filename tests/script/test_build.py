"""Prompt files and flags into jobs: what they mean, and every way in which they are refused."""

import dataclasses
import io
import os
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanrt.errors import ScriptError, UsageError
from wanrt.script import build_job, chunks_for, first_frame, load_preset, read_script
from wanrt.script.timeline import Curve

EXAMPLE = """
title    = "Ball over the bay"
preset   = "wan-tiny"
seed     = 7
size     = "224x128"
fps      = 16
duration = "5s"

[[scene]]
prompt   = "a red ball bouncing over a blue night sky"
duration = "3s"

[[scene]]
prompt     = { "a green star spinning" = 0.7, "a sunset" = 0.3 }
transition = { over = "0.5s", curve = "slerp" }
"""


def test_the_documented_example(job_of):
    job = job_of(EXAMPLE)
    assert (job.title, job.preset.name, job.seed) == ("Ball over the bay", "wan-tiny", 7)
    assert (job.width, job.height, job.fps, job.frames, job.chunks) == (224, 128, 16, 80, 7)
    first, second = job.timeline.scenes
    assert first.prompts == (("a red ball bouncing over a blue night sky", 1.0),)
    assert second.prompts == (("a green star spinning", 0.7), ("a sunset", pytest.approx(0.3)))
    assert (second.start_frame, second.start_chunk, second.ramp, second.curve) == (48, 4, 8, Curve.SLERP)
    assert job.notes == ()
    assert (job.grid, job.latent_size) == ((8, 14), (16, 28))


def test_defaults_come_from_the_preset(job_of):
    job, preset = job_of('[[scene]]\nprompt = "x"'), load_preset("wan-tiny")
    assert (job.width, job.height) == preset.video.sizes[0]
    assert (job.fps, job.steps, job.window, job.bias) == (
        preset.video.fps, preset.steps, preset.cache.window, preset.cache.bias,
    )  # fmt: skip
    assert (job.anchor, job.seed, job.frames) == ("anchor-only", 0, 80)  # five seconds
    assert (job.topology, job.precision, job.device, job.codec, job.quality) == (
        "single",
        "auto",
        "auto",
        None,
        None,
    )


def test_flags_win_over_the_file(job_of):
    given = {
        "preset": "krea-14b", "seed": "9", "size": "576x320", "fps": "24", "duration": "2s", "anchor": "latent",
        "window": "4", "bias": "0.5", "steps": "1000,500", "codec": "hevc", "quality": "crf=20", "topology": "tp=2",
        "precision": "fp8", "attention": "math", "device": "cuda:1", "weights": "~/w", "random_weights": True,
        "force": True, "stats": "s.json", "trace": "t.json", "output": "o.mkv",
    }  # fmt: skip
    text = (
        'seed = 1\nanchor = "overlap"\nbias = 0.9\nsteps = 2\n[[scene]]\nprompt = "x"\nbias = 0.1\nsteps = 3'
    )
    job = job_of(text, **given)
    assert (job.preset.name, job.seed, job.width, job.height, job.fps) == ("krea-14b", 9, 576, 320, 24)
    assert (job.frames, job.anchor, job.window, job.bias, job.steps) == (48, "latent", 4, 0.5, (1000, 500))
    assert (job.codec, job.quality, job.topology, job.precision) == ("hevc", "crf=20", "tp=2", "fp8")
    assert job.attention == "math"
    assert (job.device, job.random_weights, job.force) == ("cuda:1", True, True)
    assert (str(job.stats), str(job.trace), str(job.output)) == ("s.json", "t.json", "o.mkv")
    assert "~" not in str(job.weights)
    assert (job.timeline.scenes[0].bias, job.timeline.scenes[0].steps) == (None, None)


def test_scenes_may_have_their_own_steps_and_bias(job_of):
    job = job_of(
        '[[scene]]\nprompt = "x"\nduration = "2s"\n[[scene]]\nprompt = "y"\nbias = 0.5\nsteps = [1000, 500]'
    )
    assert (job.timeline.at(0).bias, job.timeline.at(0).steps) == (None, None)
    assert (job.timeline.at(5).bias, job.timeline.at(5).steps) == (0.5, (1000, 500))


def test_a_count_of_steps(job_of):
    assert job_of('steps = 4\n[[scene]]\nprompt = "x"').steps == load_preset("wan-tiny").steps
    two = job_of('steps = 2\n[[scene]]\nprompt = "x"').steps
    assert two == pytest.approx((1000, 2500 / 3))  # s = 1, 1/2: 1000 * 5 s / (1 + 4 s)


def test_lengths(job_of):
    scene = '[[scene]]\nprompt = "x"\n'
    assert job_of(f'duration = "1s"\n{scene}').frames == 16
    assert job_of(f"chunks = 7\n{scene}").frames == first_frame(7) == 81
    assert job_of(f"{scene}duration = 2\n{scene}duration = 0.75").frames == 44
    assert job_of(f"{scene}chunks = 2\n{scene}chunks = 1").frames == 33
    assert job_of(f'duration = "1h"\n{scene}').frames == 57600
    assert job_of(f'duration = "9s"\n{scene}', chunks="3").frames == 33
    assert job_of(f'fps = "30000/1001"\nduration = "10s"\n{scene}').frames == 300  # 299.7
    assert job_of(f'fps = 1\nduration = "1ms"\n{scene}').frames == 1


def test_scenes_without_a_length_share_what_is_left(job_of):
    scene = '[[scene]]\nprompt = "x"\n'
    job = job_of(f'duration = "10s"\n{scene}{scene}duration = "4s"\n{scene}')
    assert [s.start_frame for s in job.timeline.scenes] == [0, 48, 112]
    job = job_of(f"{scene}{scene}")
    assert ([s.start_frame for s in job.timeline.scenes], job.frames) == ([0, 80], 160)


def test_scenes_past_the_end_are_said(job_of):
    text = '[[scene]]\nprompt = "x"\nduration = "2s"\n[[scene]]\nprompt = "y"\nduration = "2s"'
    job = job_of(text, duration="1s")
    assert [scene.prompts[0][0] for scene in job.timeline.scenes] == ["x"]
    assert job.notes == ("scene 2 is not shown: it starts at 2s, the video ends at 1s",)


def test_an_unusual_size_is_said(job_of):
    (note,) = job_of('size = "64x64"\n[[scene]]\nprompt = "x"').notes
    assert "made for 224x128" in note


@given(
    st.lists(st.fractions(1, 40), min_size=1, max_size=12),
    st.sampled_from([1, 8, 16, 24, Fraction(30000, 1001)]),
)
@settings(max_examples=100)
def test_starts_against_exact_sums(lengths, fps):
    """Scene starts are exact: no error adds up over many scenes whose lengths fall between frames."""
    shortest = Fraction(12) / fps  # of a scene that surely gets a chunk
    milliseconds = [int(max(length, shortest) * 1000) + 1 for length in lengths]
    text = f'fps = "{fps}"\n' + "".join(
        f'[[scene]]\nprompt = "p"\nduration = "{ms}ms"\n' for ms in milliseconds
    )
    job = build_job(read_script("-", io.BytesIO(text.encode())))
    exact = [Fraction(sum(milliseconds[:i]), 1000) * fps for i in range(len(lengths) + 1)]
    for scene, start in zip(job.timeline.scenes, exact, strict=False):
        assert abs(scene.start_frame - start) <= Fraction(1, 2)
        assert abs(first_frame(scene.start_chunk) - scene.start_frame) <= 6
    assert abs(job.frames - exact[-1]) <= Fraction(1, 2)
    assert job.chunks == chunks_for(job.frames)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('titel = "x"', 1, "titel is unknown: did you mean title?"),
        ("zzz = 1", 1, "zzz is unknown: known here: preset,"),
        ("seed = -1", 1, "seed: got -1; expected a seed, a whole number from 0 to 9223372036854775807"),
        ('size = "223x128"', 1, "nearest: 224x128"),
        ("fps = 0", 1, "fps: got 0; expected frames per second from 1 to 240"),
        ('\n\nduration = "0s"', 3, 'duration: got "0s"; expected a duration such as "5s"'),
        ('duration = "9999h"', 1, "at most 24h"),
        ('duration = "1s"\nchunks = 2', 1, "duration or chunks, not both"),
        ("duration = true", 1, "duration: got true"),
        ("duration = 1979-05-27", 1, "duration: got 1979-05-27"),
        ("chunks = 0", 1, "a number of chunks"),
        ('anchor = "anker-only"', 1, "did you mean anchor-only?"),
        ("window = 13", 1, "window: got 13; expected 1 to 12 latent frames for wan-tiny"),
        ("bias = 0", 1, "bias: got 0; expected a KV attention bias"),
        ("bias = nan", 1, "bias: got nan"),
        ("steps = [1000, 2000]", 1, "steps: got [1000, 2000]"),
        ('codec = "divx"', 1, "one of h264, hevc, av1, vp9"),
        ("quality = 101", 1, "quality: got 101"),
        ('preset = "wan-tinny"', 1, 'preset "wan-tinny" is unknown: did you mean wan-tiny?'),
        ('preset = ""', 1, "preset: got"),
        ('prompt = "x"', 1, "prompt: belongs to a scene: write it below [[scene]]"),
        ('topology = "tp=2"', 1, "topology: not a key of the file: use the flag --topology"),
        ('attention = "cudnn"', 1, "attention: not a key of the file: use the flag --attention"),
        ('preset = "self-forcing-1.3b"\nanchor = "latent"', 2, "keeps a rolling cache and has no anchor"),
        ('preset = "longlive-1.3b"\nbias = 0.3', 2, "takes no KV attention bias"),
        ('preset = "longlive-1.3b"\nwindow = 3', 2, "expected 4 to 9 latent frames"),
    ],
)  # fmt: skip
def test_file_findings(findings_of, text, line, says):
    (finding,) = findings_of(text + '\n[[scene]]\nprompt = "x"')
    assert finding.startswith(f"<stdin>:{line}: ")
    assert says in finding


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('promt = "x"', 2, "scene 1, promt is unknown: did you mean prompt?"),
        ('prompt = ""', 2, 'scene 1, prompt: got ""; expected text that says what to show, not empty'),
        ('prompt = "  \\n "', 2, "not empty"),
        ("prompt = 3", 2, "scene 1, prompt: got 3"),
        ("prompt = {}", 2, "prompts with weights"),
        ('prompt = { "a" = 0 }', 2, "a weight above 0"),
        ('prompt = { "a" = 1, "" = 1 }', 2, "not empty"),
        ('prompt = { "a" = "x" }', 2, 'for "a", not "x"'),
        ('prompt = { "a" = nan }', 2, "not nan"),
        ('prompt = ["a"]', 2, "scene 1, prompt: got ['a']"),
        ('prompt = "x"\ntransition = "cut "\nduration = 0', 4, "scene 1, duration: got 0"),
        ('prompt = "x"\ntransition = "1s"', 3, "the first scene has nothing to blend from"),
        ('prompt = "x"\nanchor = "latent"', 3, "anchor: belongs to the whole file"),
        ('prompt = "x"\nduration = 1\nchunks = 1', 1, "duration or chunks, not both"),
        ('prompt = "x"\n[[scene]]\nprompt = "y"\ntransition = { curve = "lerp" }', 5, "transition.over is missing"),
        ('prompt = "x"\n[[scene]]\nprompt = "y"\ntransition = { over = 1, curve = "sler" }', 5, "did you mean slerp?"),
        ('prompt = "x"\n[[scene]]\nprompt = "y"\ntransition = "quick"', 5, '"cut", a time such as "0.5s"'),
        ('prompt = "x"\n[[scene]]\nprompt = "y"\nduration = 1\ntransition = 2', 6, "at most the scene's own 1s"),
        ('prompt = "x"\nduration = "0.2s"\n[[scene]]\nprompt = "y"', 3, "give it at least 0.75s"),
    ],
)  # fmt: skip
def test_scene_findings(findings_of, text, line, says):
    findings = findings_of("[[scene]]\n" + text)
    assert any(f.startswith(f"<stdin>:{line}: ") and says in f for f in findings), findings


@pytest.mark.parametrize("text", ["", "scene = []", "scene = 3", 'scene = "x"', "[scene]\nprompt = 'x'"])
def test_no_scenes(findings_of, text):
    (finding,) = findings_of(text)
    assert "[[scene]]" in finding


def test_a_scene_that_is_no_table(findings_of):
    (finding,) = findings_of("scene = [3]")
    assert finding == "<stdin>:1: scene 1: got 3; expected a table"


def test_all_findings_in_one_go_in_the_files_order(findings_of):
    text = (
        'seed = -1\nsize = "1x1"\n[[scene]]\nprompt = ""\nfoo = 1\n[[scene]]\nprompt = "x"\nduration = "0s"\n'
    )
    findings = findings_of(text, fps="x", codec="y")
    assert [f.split(" ")[0] for f in findings] == [
        "--fps:",
        "--codec:",
        *(f"<stdin>:{n}:" for n in (1, 2, 4, 5, 8)),
    ]
    assert len(set(findings)) == len(findings)


def test_findings_about_the_model_come_with_the_others(findings_of):
    text = 'preset = "self-forcing-1.3b"\nseed = -1\nanchor = "latent"\n[[scene]]\nprompt = ""'
    assert [f.split(" ")[0] for f in findings_of(text)] == ["<stdin>:2:", "<stdin>:3:", "<stdin>:5:"]
    assert len(findings_of(text, preset="nothing", fps="x")) == 4
    assert len(findings_of('preset = "nothing"\nfps = 0\nduration = 1\nchunks = 1')) == 3


def test_the_last_scene_may_be_extended(job_of):
    text = '[[scene]]\nprompt = "x"\nduration = "2s"\n[[scene]]\nprompt = "y"\ntransition = "10s"'
    assert job_of(text, duration="20s").timeline.scenes[1].ramp == 160


def test_flag_findings(findings_of):
    scene = '[[scene]]\nprompt = "x"'
    assert findings_of(scene, topology="tp=x")[0].startswith('--topology: got "tp=x"; expected single, tp=N')
    assert findings_of(scene, device="gpu")[0].startswith('--device: got "gpu"')
    assert findings_of(scene, duration="1s", chunks="3") == ["flags: expected duration or chunks, not both"]
    assert findings_of(scene, preset="self-forcing-1.3b", anchor="latent")[0].startswith(
        "--anchor: self-forcing-1.3b"
    )


def test_videos_longer_than_a_day(findings_of):
    many = '[[scene]]\nprompt = "x"\nduration = "20h"\n' * 3
    assert "the video would last 60.0 hours; expected at most 24" in findings_of(many)[0]
    assert "at most 24" in findings_of('[[scene]]\nprompt = "x"', chunks="2000000")[0]


@pytest.mark.parametrize(
    "text", ["single", "auto", "tp=2", "ulysses=5", "pp1+tp=4", "pp1+ulysses=4+vae=4", "tp=2+vae=2"]
)
def test_topologies(job_of, text):
    assert job_of('[[scene]]\nprompt = "x"', topology=text, preset="krea-14b").topology == text


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=0", "tp=-1", "pp2+tp=2", "vae=2", "tp=2+", "TP=2", "single+vae=2", "tp=9999"]
)
def test_wrong_topologies(findings_of, text):
    assert findings_of('[[scene]]\nprompt = "x"', topology=text)


def test_topologies_that_the_model_cannot_take(findings_of):
    (finding,) = findings_of('[[scene]]\nprompt = "x"', topology="tp=5", preset="krea-14b")
    assert finding.startswith("--topology tp=5: 13824 % 5 = 4 (ffn_dim), expected 0; nearest valid: tp=4")


def test_bare_prompts():
    job = build_job(read_script("a red ball bouncing"), {"duration": "1s"})
    assert job.timeline.prompts() == ("a red ball bouncing",)
    assert str(job.output) == "wanrt.mp4"
    long = "word " * 2000
    assert build_job(read_script(long)).timeline.prompts() == (long.strip(),)
    with pytest.raises(UsageError, match="empty prompt"):
        read_script("  ")
    with pytest.raises(ScriptError, match=r'^scene 1, prompt: got "x.*at most 100,000 characters'):
        build_job(read_script("x" * 100_001))


def test_files_demos_and_stdin(tmp_path, monkeypatch):
    file = tmp_path / "my clip.toml"
    file.write_text(EXAMPLE)
    job = build_job(read_script(str(file)))
    assert str(job.output) == "my clip.mp4"
    monkeypatch.chdir(tmp_path)
    assert (
        read_script("demo").source
        == read_script("presets/demo.toml").source
        == read_script("demo.toml").source
    )
    (tmp_path / "demo.toml").write_text('[[scene]]\nprompt = "mine"')
    assert build_job(read_script("demo.toml")).timeline.prompts() == ("mine",)
    assert read_script("-", io.BytesIO(EXAMPLE.encode())).source.name == "<stdin>"
    with pytest.raises(UsageError, match="no standard input"):
        read_script("-")


@pytest.mark.parametrize(
    ("name", "says"),
    [("demp.toml", "did you mean demo"), ("nothing/here.toml", "demo"), ("x\0.toml", "cannot be read")],
)
def test_missing_files(name, says):
    with pytest.raises(UsageError, match=says):
        read_script(name)


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        read_script(str(tmp_path / "x.toml"))


def test_one_word_that_can_only_be_a_path_is_no_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", str(tmp_path)):
        with pytest.raises(UsageError, match="Is a directory"):
            read_script(name)
    for name in ("demo.tml", "story.txt"):
        with pytest.raises(UsageError, match="does not exist"):
            read_script(name)
    with pytest.raises(ScriptError, match="scene is missing"):
        build_job(read_script("/dev/null"))
    for prompt in ("sunset", "sea/sky", "wait...", "a ball in demo.tml"):
        assert build_job(read_script(prompt)).timeline.prompts() == (prompt,)


def test_a_pipe_is_read_as_a_file(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, EXAMPLE.encode())
    os.close(writing)
    assert build_job(read_script(f"/dev/fd/{reading}")).timeline.prompts()
    os.close(reading)


def test_a_model_preset_is_no_prompt_file():
    with pytest.raises(ScriptError, match=r'wanrt render --preset krea-14b "PROMPT"'):
        build_job(read_script("presets/krea-14b.toml"))


def test_jobs_are_frozen(job_of):
    with pytest.raises(dataclasses.FrozenInstanceError):
        job_of(EXAMPLE).seed = 3
