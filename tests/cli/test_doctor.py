"""The doctor's judgements on machines that are not here, and its report on the one that is."""

import json
import math

import pytest

from wanrt.cli import app
from wanrt.probes import doctor
from wanrt.probes.doctor import GIB, Check, Gpu, Verdict
from wanrt.script import load_preset, preset_names

H200 = Gpu(0, "NVIDIA H200", (9, 0), 139 * GIB, 138 * GIB)
CARD = Gpu(0, "some 48 GB board", (8, 9), 47 * GIB, 47 * GIB)
SMALL = Gpu(0, "small", (8, 6), 8 * GIB, 8 * GIB)


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        (90701, Verdict.GOOD), (90800, Verdict.BAD), (91002, Verdict.BAD), (91200, Verdict.BAD),
        (91300, Verdict.NOTE), (91400, Verdict.NOTE), (91500, Verdict.GOOD), (100000, Verdict.GOOD),
    ],
)  # fmt: skip
def test_cudnn_versions(version, verdict):
    assert doctor.judge_cudnn(version)[0] is verdict


@pytest.mark.parametrize(
    ("name", "gpus", "missing", "verdict", "says"),
    [
        ("wan-tiny", [], (), Verdict.GOOD, "will run on the CPU"),
        ("wan-tiny", [SMALL], (), Verdict.GOOD, "will run with --topology single"),
        ("wan-tiny", [], ("vae",), Verdict.NOTE, "reinstall wanrt"),
        ("krea-14b", [], (), Verdict.NOTE, "needs a GPU with"),
        ("krea-14b", [SMALL], (), Verdict.NOTE, "its device has 8.0 GiB"),
        ("krea-14b", [H200], (), Verdict.GOOD, "will run with --topology single"),
        ("krea-14b", [CARD] * 4, (), Verdict.GOOD, "with --topology pp1+"),
        ("krea-14b", [H200], ("text_encoder",), Verdict.NOTE, "no text encoder: wanrt weights pull krea-14b"),
    ],
)
def test_preset_verdicts(name, gpus, missing, verdict, says):
    got, text = doctor.judge_preset(load_preset(name), gpus, missing)
    assert got is verdict
    assert says in text


def test_a_check_that_breaks_is_a_row():
    def broken():
        yield Check("x", "one", Verdict.GOOD, "fine")
        raise OSError("no\nsuch thing")

    rows = doctor._guarded("x", broken)
    assert [row.verdict for row in rows] == [Verdict.GOOD, Verdict.BAD]
    assert "OSError: no such thing" in rows[1].text


def test_healthy_needs_a_preset_that_runs():
    good = Check("presets", "a", Verdict.GOOD, "")
    assert doctor.healthy([good, Check("x", "b", Verdict.NOTE, "")])
    assert not doctor.healthy([good, Check("x", "b", Verdict.BAD, "")])
    assert not doctor.healthy([Check("presets", "a", Verdict.NOTE, "")])


def test_encoders_are_tried():
    rows = {row.name: row for row in doctor.encoders()}
    assert rows["h264 libx264"].verdict is Verdict.GOOD


def test_terminal_without_one():
    (row,) = doctor.terminal({"TERM": "dumb"})
    assert "plain lines" in row.text


def test_report_of_this_machine(capsys):
    with pytest.raises(SystemExit) as ended:
        app.run(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["section"] for row in rows} >= {"versions", "devices", "encoders", "terminal", "presets"}
    assert {row["name"] for row in rows if row["section"] == "presets"} == set(preset_names())
    checks = [Check(**{**row, "verdict": Verdict(row["verdict"])}) for row in rows]
    assert ended.value.code == (0 if doctor.healthy(checks) else 1)
    text = doctor.report(checks)
    assert all(line == "" or line.strip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("reason", "error", "verdict", "says"),
    [
        ("X is SM 8.0, fp8 products need SM 8.9", None, Verdict.FACT, "none: X is SM 8.0"),
        (None, 2e-3, Verdict.GOOD, "differs from fp32 by 2.0e-03"),
        (None, 0.3, Verdict.BAD, "wrong; do not use --precision fp8"),
    ],
)
def test_fp8_verdicts(monkeypatch, reason, error, verdict, says):
    monkeypatch.setattr("wanrt.models.fp8.why_no_fp8", lambda device: reason)
    monkeypatch.setattr("wanrt.models.fp8.product_error", lambda device: error)
    (row,) = doctor.fp8([H200])
    assert row.verdict is verdict
    assert says in row.text


@pytest.mark.gpu
def test_fp8_on_a_gpu():
    assert all(row.verdict is not Verdict.BAD for row in doctor.fp8(doctor.find_gpus()))


@pytest.mark.gpu
def test_on_a_gpu():
    gpus = doctor.find_gpus()
    assert gpus
    assert math.isfinite(doctor.conv3d_error(0))
    assert [row.name for row in doctor.cudnn(gpus)] == ["cudnn", "bf16 conv3d"]


@pytest.mark.multigpu
def test_links_between_gpus():
    gpus = doctor.find_gpus()
    assert len(list(doctor.links(gpus))) == len(gpus) * (len(gpus) - 1) // 2
    assert doctor.copy_rate(0, 1) > 0.1
