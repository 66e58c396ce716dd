from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanrt.script import units
from wanrt.script.units import Expected


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5s", 5), ("1m30s", 90), ("750ms", Fraction(3, 4)), ("1h", 3600), ("1.5s", Fraction(3, 2)),
        ("2min", 120), ("1h 2m 3s 4ms", Fraction(3_723_004, 1000)), ("5", 5), (5, 5), (0.1, Fraction(1, 10)),
        (" 5S ", 5), (".5s", Fraction(1, 2)), ("24h", 86400), ("1ms", Fraction(1, 1000)),
    ],
)  # fmt: skip
def test_duration(value, seconds):
    assert units.duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "s", "5x", "5s5s", "-1s", -1, 0, "0s", "25h", 1e300, float("nan"), float("inf"), True, None, [], {}, "1e400",
     "5 apples", "1s2", "0.0001s", 10**400, "1/0", "\u0665s"],
)  # fmt: skip
def test_duration_refused(value):
    with pytest.raises(Expected):
        units.duration(value)


def test_zero_duration_only_where_asked():
    assert units.duration("0s", zero=True) == 0
    assert units.duration(0, zero=True) == 0


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_duration_parts_add_up(h, m, s, ms):
    expected = Fraction(((h * 60 + m) * 60 + s) * 1000 + ms, 1000)
    assert units.duration(f"{h}h{m}m{s}s{ms}ms", zero=True) == expected


@pytest.mark.parametrize(
    ("value", "size"),
    [("832x480", (832, 480)), ("224X128", (224, 128)), ("576 x 320", (576, 320)), ([64, 32], (64, 32))],
)
def test_size(value, size):
    assert units.size(value) == size


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("833x480", "832x480"),
        ("831x479", "832x480"),
        ("1x1", "32x32"),
        ("99999x480", "4096x480"),
        ([7, 40], "32x48"),
    ],
)
def test_size_names_the_nearest(value, nearest):
    with pytest.raises(Expected, match=f"nearest: {nearest}"):
        units.size(value)


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_nearest_size_is_valid_and_nearest(width, height):
    try:
        assert units.size([width, height]) == (width, height)
        assert width % 16 == height % 16 == 0
    except Expected as bad:
        got = units.size(str(bad).rpartition("nearest: ")[2])
        valid = range(32, 4097, 16)
        best = [min(abs(n - v) for v in (valid[0], valid[-1], n // 16 * 16, -(-n // 16) * 16) if v in valid)
                for n in (width, height)]  # fmt: skip
        assert [abs(a - b) for a, b in zip(got, (width, height), strict=True)] == best


@pytest.mark.parametrize(
    "value", ["832", "axb", [1], [1, 2, 3], [True, 16], [16.0, 16.0], 5, None, "-16x16", "16x16x16"]
)
def test_size_refused(value):
    with pytest.raises(Expected):
        units.size(value)


@pytest.mark.parametrize(
    ("value", "rate"),
    [
        (16, 16),
        ("30000/1001", Fraction(30000, 1001)),
        (23.976, Fraction(2997, 125)),
        ("24", 24),
        (1, 1),
        (240, 240),
    ],
)
def test_fps(value, rate):
    assert units.fps(value) == rate


@pytest.mark.parametrize("value", [0, -1, 241, "x", float("nan"), "1/0", True, "0x10", 0.5])
def test_fps_refused(value):
    with pytest.raises(Expected):
        units.fps(value)


def test_seed_range():
    assert units.seed(2**63 - 1) == 2**63 - 1
    assert units.seed("7") == 7
    for value in (2**63, -1, 1.0, True, "x", "1e3", 10**5000):
        with pytest.raises(Expected):
            units.seed(value)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (4, 4),
        ("4", 4),
        ([1000, 500], (1000, 500)),
        ("1000,937,833,625", (1000, 937, 833, 625)),
        ([1000], (1000,)),
    ],
)
def test_steps(value, steps):
    assert units.steps(value) == steps


@pytest.mark.parametrize(
    "value", [0, 51, [], [900, 500], [1000, 1000], [1000, 0], [1000, -5], "a,b", None, 4.0, [10**400]]
)
def test_steps_refused(value):
    with pytest.raises(Expected):
        units.steps(value)


@pytest.mark.parametrize(
    ("value", "quality"), [(75, 75), ("0", 0), ("crf=18", "crf=18"), (" crf = 18.5 ", "crf=18.5")]
)
def test_quality(value, quality):
    assert units.quality(value) == quality


@pytest.mark.parametrize("value", [-1, 101, "crf=64", "crf=", "best", True, float("inf")])
def test_quality_refused(value):
    with pytest.raises(Expected):
        units.quality(value)


def test_nearest_word():
    assert units.nearest("promt", ["prompt", "preset"]) == "prompt"
    assert units.nearest("SEED", ["seed"]) == "seed"
    assert units.nearest("zzz", ["prompt"]) is None


@given(
    st.one_of(st.text(), st.binary(), st.integers(), st.floats(), st.dictionaries(st.text(), st.integers()))
)
def test_show_is_one_short_printable_line(value):
    text = units.show(value)
    assert len(text) <= 60
    assert text.isprintable() or not text
