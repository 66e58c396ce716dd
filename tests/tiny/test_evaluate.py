"""Which seconds of a video are judged."""

import pytest

from wanrt.tiny.evaluate import judged_chunks


@pytest.mark.parametrize(
    ("chunks", "early", "late"),
    [(9, [1], [5]), (12, [1], [8]), (25, [1, 5, 9], [13, 17, 21]), (80, [1, 5, 9], [68, 72, 76])],
)
def test_both_ends_are_judged_without_overlap(chunks, early, late):
    assert judged_chunks(chunks) == (early, late)
    assert early[-1] + 4 <= late[0]
    assert late[-1] + 4 == chunks


def test_a_video_too_short_is_refused():
    with pytest.raises(ValueError, match="expected at least 9"):
        judged_chunks(8)
