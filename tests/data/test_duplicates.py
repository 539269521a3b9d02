"""Near-duplicates on hand-made texts, and against the definition computed pair by pair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.data.duplicates import FEW_LINES, LineIndex, Match, distinct_lines


def lines(start: int, stop: int) -> str:
    return "".join(f"line {number}\n" for number in range(start, stop))


def test_distinct_lines_are_stripped_and_not_blank() -> None:
    assert distinct_lines("a\n  a  \r\n\n\t\nb b\n") == {"a", "b b"}


@pytest.mark.parametrize(
    ("heldout", "text", "share"),
    [
        (lines(0, 100), lines(0, 100), 1.0),
        (lines(0, 100), lines(50, 150), 0.5),
        # The shorter of the two counts: a part of a held-out document, and a document around one.
        (lines(0, 100), lines(0, 30), 1.0),
        (lines(0, 40), lines(0, 400), 1.0),
        # Order, indentation and repetition do not matter.
        (lines(0, 50), "\n".join(reversed(lines(0, 50).splitlines())).replace("line", "   line") * 3, 1.0),
        # A trivial held-out document does not claim a long one, but a trivial copy of it is one.
        ("import os\n", "import os\n" + lines(0, 500), 1 / FEW_LINES),
        ("import os\n", "import os\n", 1.0),
        ("import os\nimport sys\n", "import os\nx = 1\n", 0.5),
    ],
)
def test_share(heldout: str, text: str, share: float) -> None:
    assert LineIndex([heldout]).nearest(text, 0.01) == Match(0, pytest.approx(share))


def test_the_nearest_is_found_and_nothing_in_common_is_none() -> None:
    index = LineIndex([lines(0, 60), lines(20, 80), lines(500, 600)])
    assert index.nearest(lines(30, 90), 0.5) == Match(1, pytest.approx(50 / 60))
    assert index.nearest(lines(30, 90), 50 / 60) == Match(1, pytest.approx(50 / 60))
    assert index.nearest(lines(30, 90), 51 / 60) is None
    assert index.nearest(lines(1000, 1010), 0.01) is None
    assert index.nearest("\n \n", 0.01) is None
    assert LineIndex([""]).nearest("x", 0.01) is None


texts = st.lists(st.integers(0, 40), max_size=60).map(lambda numbers: "\n".join(map(str, numbers)))


@settings(deadline=None, max_examples=300)
@given(heldout=st.lists(texts, max_size=6), text=texts, at_least=st.floats(0.01, 1) | st.sampled_from([0.5, 0.55, 1]))
def test_share_is_that_of_the_definition(heldout: list[str], text: str, at_least: float) -> None:
    shares = []
    for document in heldout:
        a, b = distinct_lines(text), distinct_lines(document)
        shares.append(len(a & b) / min(len(a), max(len(b), FEW_LINES)) if a else 0.0)
    match = LineIndex(heldout).nearest(text, at_least)
    if max(shares, default=0.0) >= at_least:
        assert match == Match(shares.index(max(shares)), max(shares))
    else:
        assert match is None
