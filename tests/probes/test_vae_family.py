"""The table of diffusers' video VAEs: rows whose answers are known, and how the table gets into a page."""

from pathlib import Path

import pytest

from wanrt.errors import UsageError
from wanrt.probes.vae_family import FAMILY, examine, find_member
from wanrt.probes.vae_report import BEGIN, END, FAMILY_COLUMNS, family_markdown, family_table, write_section


@pytest.fixture(scope="module")
def rows():
    names = ("Wan 2.1", "SVD", "HunyuanVideo", "Cosmos")
    return {name: examine(find_member(name), clip=7, reach_clip=9) for name in names}


def test_wan_is_causal_special_and_goes_one_by_one(rows) -> None:
    row = rows["Wan 2.1"]
    assert row.causal
    assert row.first_special
    assert row.minimum_t == 1
    assert row.frames == {1: 1, 2: 5, 3: 9, 4: 13, 5: 17}
    assert row.pieces == (1,) * 7
    assert row.partial == "yes, every prefix"


def test_svd_sees_the_whole_clip_both_ways(rows) -> None:
    row = rows["SVD"]
    assert not row.causal
    assert not row.first_special
    assert (row.history, row.future) == (7, 8)
    assert row.partial == "no"


def test_hunyuan_bleeds_through_its_norms_only_and_tiles(rows) -> None:
    row = rows["HunyuanVideo"]
    assert not row.causal
    assert row.bleed > 1e-3
    assert row.bleed_without_norm == 0
    assert "overlapping tiles" in row.method


def test_cosmos_attends_to_all_past_frames(rows) -> None:
    row = rows["Cosmos"]
    assert row.causal
    assert row.history == 7
    assert row.method == "one pass"


def test_every_member_is_found_by_title_and_class() -> None:
    for member in FAMILY:
        assert find_member(member.title) is member
        assert find_member(member.cls).cls == member.cls
    with pytest.raises(UsageError, match="expected one of AutoencoderKLWan"):
        find_member("AutoencoderKL")


def test_table_goes_between_the_markers_and_nowhere_else(rows, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    text = family_markdown(list(rows.values()), "0.0")
    for _ in range(2):
        write_section(page, text)
        assert page.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    assert all(
        line.count("|") == len(FAMILY_COLUMNS) + 1 for line in text.splitlines() if line.startswith("|")
    )
    assert family_table(list(rows.values())).row_count == 4


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(UsageError, match="expected the lines"):
        write_section(page, "x")
    with pytest.raises(UsageError, match="No such file"):
        write_section(tmp_path / "none.md", "x")
