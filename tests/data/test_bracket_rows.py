"""Lines up to the brackets that end them: true to the source."""

import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from kajiya.config.options import StdlibBracketsSource
from kajiya.data.bracket_rows import before_brackets, stdlib_brackets
from kajiya.data.entries import Row

ROOT = Path(sysconfig.get_paths()["stdlib"])


def test_rows_are_real_lines_and_their_completion_ends_them() -> None:
    rows = [row for row in stdlib_brackets(StdlibBracketsSource()) if isinstance(row, Row)]
    assert len(rows) > 3000
    lines: dict[str, list[str]] = {}
    for row in rows:
        file, _, number = row.name.rpartition(":")
        if file not in lines:
            lines[file] = (ROOT / file).read_text(encoding="utf-8").split("\n")
        assert lines[file][int(number) - 1].strip() == row.columns["prompt"] + row.columns["completion"]
        assert row.group == file
    endings = Counter(row.columns["completion"] for row in rows)
    assert len(endings) > 10
    assert endings.most_common(1)[0][1] < len(rows) / 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("value = call(first, second)", ("value = call(first, second", ")")),
        ("def call(first, second):", ("def call(first, second", "):")),
        ("table[key] = {first: call(second[0])}", ("table[key] = {first: call(second[0", "])}")),
        ("value = call(first) + 1", None),
        ("value = call(first", None),
        ("value = call(first])", None),
        ("value = call(second())", None),
        ("value = call('text')", None),
        ("call(first)  # why (or not)", None),
        ("f(x)", None),
    ],
)
def test_which_lines_are_taken(line: str, expected: tuple[str, str] | None) -> None:
    assert before_brackets(line) == expected
