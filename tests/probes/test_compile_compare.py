"""The comparison of two measurements: parts that add up, reasons that follow from the numbers, files refused."""

import copy
import json
from fractions import Fraction

import pytest

from wanrt.errors import UsageError
from wanrt.probes.compile_command import Request, run
from wanrt.probes.compile_compare import CLASSES, GAPS, compare, gain
from wanrt.probes.compile_document import KIND, SCHEMA, read


def one_pass(name, wall, **classes):
    return {
        "name": name,
        "wall_ms": wall,
        "classes": {w: {"count": 1, "ms": ms} for w, ms in classes.items()},
    }


def measurement(device, eager, compiled):
    """`eager` and `compiled`: milliseconds of a denoising step by class, gaps among them; half of it a context pass."""

    def passes(parts):
        wall, classes = sum(parts.values()), {w: ms for w, ms in parts.items() if w != GAPS}
        half = {w: ms / 2 for w, ms in classes.items()}
        return [one_pass("context", wall / 2, **half), one_pass("denoise", wall, **classes)]

    settings = {"preset": "krea-14b", "size": [576, 320], "layers": 2, "steps": 4, "window": 3}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "device": device,
        "machine": {"versions": {"torch": "2.11"}},
        "settings": {**settings, "dtype": "bfloat16", "backend": "inductor"},
        "variants": [
            {"variant": {"path": "plain", "compiled": on}, "passes": passes(parts)}
            for on, parts in ((False, eager), (True, compiled))
        ],
    }


# the same savings; on "slow" the products take five times as long, as they do where arithmetic is the weak point
FAST = {"gemm": 1.1, "attention": 0.37, "elementwise": 1.3, "copy": 0.3, "gaps": 0.21}
FAST_COMPILED = {"gemm": 1.1, "attention": 0.37, "elementwise": 0.45, "copy": 0.05, "gaps": 0.17}
SLOW = {**FAST, "gemm": 5.5, "attention": 1.9}
SLOW_COMPILED = {**FAST_COMPILED, "gemm": 5.5, "attention": 1.9}


@pytest.fixture
def pair():
    return measurement("fast", FAST, FAST_COMPILED), measurement("slow", SLOW, SLOW_COMPILED)


def test_contributions_add_up_exactly(pair):
    (found,) = compare(*pair, ("a", "b"))
    for g in (found.a, found.b):
        assert sum(g.points(work) for work in CLASSES) == g.total == g.eager_ms / g.compiled_ms - 1
    assert sum(found.points(work) for work in CLASSES) == found.difference == found.a.total - found.b.total


def test_odd_numbers_add_up_exactly_too():
    odd = {w: 0.1 + 0.7**i / 3 for i, w in enumerate(CLASSES)}
    odder = {w: ms * (0.2 + 0.11 * i) for i, (w, ms) in enumerate(odd.items())}
    (found,) = compare(measurement("x", odd, odder), measurement("y", odder, odd), ("a", "b"))
    for g in (found.a, found.b):
        assert sum((g.points(work) for work in CLASSES), Fraction(0)) == g.total
    assert sum((found.points(work) for work in CLASSES), Fraction(0)) == found.difference


def test_a_chunk_is_its_steps_and_one_other_pass(pair):
    g = gain(pair[0], "plain")
    assert float(g.eager["gemm"]) == pytest.approx(4.5 * 1.1)
    assert float(g.eager[GAPS]) == pytest.approx(4.5 * 0.21)
    assert float(g.total) == pytest.approx(sum(FAST.values()) / sum(FAST_COMPILED.values()) - 1)


def test_the_reason_is_the_share_when_the_saving_is_the_same(pair):
    (found,) = compare(*pair, ("a", "b"))
    headline, first, *_ = found.sentences()
    assert headline.startswith("plain: compiling gains 53.3 % on fast and 14.1 % on slow; elementwise")
    assert "fast spends 39.6 % of its eager time there and compiling removes 65.4 % of it" in first
    assert "slow spends 14.1 % of its eager time there" in first
    assert "most of all matrix products (5.00x): so the same part removed weighs less on slow" in first


def test_the_reason_reads_the_same_from_the_other_side(pair):
    (found,) = compare(*reversed(pair), ("a", "b"))
    headline, first, *_ = found.sentences()
    assert headline.startswith("plain: compiling gains 14.1 % on slow and 53.3 % on fast; elementwise")
    assert "so the same part removed weighs more on fast" in first


def test_the_reason_is_the_compiler_when_it_removes_less(pair):
    lame = {**FAST, "elementwise": 1.2}
    (found,) = compare(pair[0], measurement("lame", FAST, lame), ("a", "b"))
    _, first, *_ = found.sentences()
    assert (
        "The compiler does not do the same there: it saves 3.83 ms a chunk on fast, 0.45 ms on lame" in first
    )


def test_classes_without_time_and_equal_devices(pair):
    (found,) = compare(pair[0], copy.deepcopy(pair[0]), ("a.json", "b.json"))
    assert (found.a.device, found.b.device) == ("a.json", "b.json")
    assert list(found.sentences()) == [
        "plain: compiling gains 53.3 % on a.json and 53.3 % on b.json: no difference."
    ]
    only = measurement("only", {"gemm": 1.0}, {"gemm": 0.5})
    assert any("nothing to weigh" in s for s in compare(pair[0], only, ("a", "b"))[0].sentences())


def test_the_command_prints_reasons_then_a_table(pair, tmp_path, capsys):
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, doc in zip(files, pair, strict=True):
        file.write_text(json.dumps(doc))
    run(Request(compare=tuple(files)))
    out = capsys.readouterr().out
    assert out.startswith("plain: compiling gains")
    assert out.index("most of all matrix products") < out.index("a chunk eager and compiled, ms")
    assert "+53.27" in out
    assert "+14.13" in out


def write(tmp_path, document):
    file = tmp_path / "m.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "not JSON"),
        (lambda d: "[]", "not a measurement"),
        (lambda d: {"schema": 1, "runs": []}, "not a measurement"),  # wanrt bench's
        (lambda d: {**d, "schema": 0}, "got schema 0, expected 1"),
        (lambda d: {k: v for k, v in d.items() if k != "settings"}, "damaged"),
        (lambda d: {**d, "variants": []}, "damaged"),
        (lambda d: {**d, "variants": [{**d["variants"][0], "passes": [one_pass("denoise", 0.0)]}]}, "damaged"),
        (lambda d: {**d, "variants": [{**d["variants"][0], "passes": [one_pass("denoise", 1, magic=1)]}]}, "damaged"),
    ],
)  # fmt: skip
def test_foreign_files_are_refused(pair, tmp_path, change, message):
    file = write(tmp_path, change(pair[0]))
    with pytest.raises(UsageError, match=message) as caught:
        read(file)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value"), [("preset", "wan-tiny"), ("size", [832, 480]), ("layers", 4), ("dtype", "float32")]
)
def test_different_settings_are_not_comparable(pair, tmp_path, key, value):
    other = copy.deepcopy(pair[1])
    other["settings"][key] = value
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, doc in zip(files, (pair[0], other), strict=True):
        file.write_text(json.dumps(doc))
    with pytest.raises(UsageError, match=f"not comparable: .*{key}"):
        run(Request(compare=tuple(files)))


def test_compare_stands_alone(tmp_path):
    with pytest.raises(UsageError, match="without other options"):
        run(Request(compare=(tmp_path, tmp_path), layers=2))
