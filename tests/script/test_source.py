"""The scanner against tomllib: the same paths, and lines that a person would count."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wanrt.errors import ScriptError
from wanrt.script.source import MAX_BYTES, parse

SAMPLE = '''\
title = "x # no comment" # a comment
"a.b".c = """
two
lines"""
'single' = \'\'\'it's
so\'\'\'

[[scene]]
prompt = { "a ] # b" = 0.7, 'q' = [1,
  2, { z = 1 }] }
[[scene]]   # two
x . y = 1
x.w = """quotes at the end""\"""
[scene.inner]
when = 1979-05-27 07:32:00
[[scene.sub]]
v = [ # comment ]
  "a", # "b"
  "c",
]
'''


def test_lines_of_a_sample():
    source = parse(SAMPLE.encode(), "f")
    wanted = {
        ("title",): 1, ("a.b", "c"): 2, ("single",): 5, ("scene",): 8, ("scene", 0): 8, ("scene", 0, "prompt"): 9,
        ("scene", 0, "prompt", "a ] # b"): 9, ("scene", 0, "prompt", "q", 1): 10,
        ("scene", 0, "prompt", "q", 2, "z"): 10, ("scene", 1): 11, ("scene", 1, "x", "y"): 12,
        ("scene", 1, "x", "w"): 13, ("scene", 1, "inner"): 14, ("scene", 1, "inner", "when"): 15,
        ("scene", 1, "sub", 0): 16, ("scene", 1, "sub", 0, "v"): 17, ("scene", 1, "sub", 0, "v", 1): 19,
    }  # fmt: skip
    assert {path: source.line(path) for path in wanted} == wanted
    assert source.line(("scene", 1, "nothing", "here")) == 11  # the nearest part that is there


def paths(value, base=()):
    """Every path into parsed TOML."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return set()
    found = set()
    for key, inner in items:
        found |= {(*base, key)} | paths(inner, (*base, key))
    return found


def test_paths_equal_tomllibs():
    source = parse(SAMPLE.encode(), "f")
    assert set(source.lines) == paths(source.data)


keys = st.one_of(
    st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=6),
    st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters='"\\'), max_size=6).map(
        '"{}"'.format
    ),
    st.text(string.ascii_letters + ' .#[]="{}', max_size=6).map("'{}'".format),
)
strings = st.one_of(
    st.text(string.printable.translate({ord(c): None for c in '"\\\r\n\x0b\x0c'}), max_size=12).map(
        '"{}"'.format
    ),
    st.text(string.ascii_letters + ' #"[]{}=,', max_size=12).map("'{}'".format),
    st.text(string.ascii_letters + " #[]{}=,\n'", max_size=12).map('"""{}"""'.format),
    st.text(string.ascii_letters + ' #[]{}=,\n"', max_size=12).map("'''{}'''".format),
    st.sampled_from(
        ['"\\""', '"\\\\"', '"\\u00e9 ]"', '"""\\""""', '"""a\\\n   b"""', '""""a"""""', "''''a'''''"]
    ),
)
atoms = st.one_of(
    strings,
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False)
    .map(repr)
    .filter(lambda t: "e" not in t or "." in t.split("e")[0]),
    st.sampled_from(
        ["true", "false", "inf", "-nan", "0x1F", "1_000", "1979-05-27T07:32:00Z", "1979-05-27 07:32:00"]
    ),
)
gap = st.sampled_from(["", " ", "\t", "\n", " # ]}\n", "\n\n  "])


def arrays(inner):
    return st.lists(st.tuples(gap, inner, gap), max_size=3).map(
        lambda cells: "[" + ",".join("".join(cell) for cell in cells) + "]"
    )


def inline_tables(inner):
    return st.dictionaries(keys, inner, max_size=3).map(
        lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
    )


values = st.recursive(atoms, lambda inner: st.one_of(arrays(inner), inline_tables(inner)), max_leaves=8)
dotted = st.lists(keys, min_size=1, max_size=3).map(" . ".join)
pairs = st.tuples(dotted, values).map(lambda pair: f"{pair[0]} = {pair[1]}")
headers = st.one_of(dotted.map("[{}]".format), dotted.map("[[ {} ]]".format))
documents = st.lists(st.one_of(pairs, pairs, headers, st.just("# ]] comment"), st.just("")), max_size=8).map(
    "\n".join
)


@settings(max_examples=300)
@given(documents)
def test_random_documents(text):
    try:
        source = parse(text.encode(), "f")
    except ScriptError:
        return  # not valid TOML (a key twice): test_fuzz has those
    assert set(source.lines) == paths(source.data)
    assert all(1 <= line <= text.count("\n") + 1 for line in source.lines.values())


@given(st.lists(st.sampled_from(["", "# x", 'a{} = "y"', "a{} = '''\n\n'''", "a{} = [\n1,\n]"]), max_size=20))
def test_key_lines(lines):
    text, wanted = "", {}
    for i, line in enumerate(lines):
        if "a{}" in line:
            wanted[(f"a{i}",)] = text.count("\n") + 1
        text += line.format(i) + "\n"
    source = parse(text.replace("\n", "\r\n").encode(), "f")
    assert {path: line for path, line in source.lines.items() if len(path) == 1} == wanted


@pytest.mark.parametrize(
    ("raw", "line", "word"),
    [
        (b"\n\nx = \n", 3, "not TOML"), (b"a = 1\n\xff\xfe", 2, "UTF-8"), (b"\x00", 1, "not TOML"),
        (b"a = '", 1, "not TOML"), (b"a = [\n1,\n", 2, "not TOML"), (b"a = 1\na = 2", 2, "not TOML"),
        (b"a = " + b"9" * 5000, 1, "digits"), (b"a = " + b"[" * 5000, 1, "deep"),
        (b"x" * (MAX_BYTES + 1), 1, "bytes"),
    ],
)  # fmt: skip
def test_not_toml(raw, line, word):
    with pytest.raises(ScriptError, match=word) as caught:
        parse(raw, "f.toml")
    assert str(caught.value).startswith(f"f.toml:{line}: ")
    assert "\n" not in str(caught.value)


def test_byte_order_mark_is_skipped():
    assert parse("\ufefftitle = 'x'".encode(), "f").data == {"title": "x"}
