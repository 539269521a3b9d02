"""Lines cut within brackets: true to the source, and closed by what the row says."""

import ast
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from kajiya.config.options import StdlibBracketsSource
from kajiya.data.bracket_rows import bracket_cut, stdlib_brackets
from kajiya.data.entries import Row

ROOT = Path(sysconfig.get_paths()["stdlib"])


def test_rows_are_real_lines_and_their_completion_closes_them() -> None:
    rows = [row for row in stdlib_brackets(StdlibBracketsSource()) if isinstance(row, Row)]
    assert len(rows) > 1000
    lines = {}
    parsed = 0
    for row in rows:
        file, _, number = row.name.rpartition(":")
        if file not in lines:
            lines[file] = (ROOT / file).read_text(encoding="utf-8").split("\n")
        prompt, completion = row.columns["prompt"], row.columns["completion"]
        assert lines[file][int(number) - 1].strip().startswith(prompt)
        opened = [character for character in prompt + completion if character in "([{"]
        assert Counter(opened) == Counter(
            {")": "(", "]": "[", "}": "{"}[character] for character in prompt + completion if character in ")]}"
        )
        assert row.group == file
        try:
            ast.parse(prompt + completion)
            parsed += 1
        except SyntaxError:
            continue  # the first line of a block, or the middle of a statement
    assert parsed > len(rows) / 2
    endings = Counter(row.columns["completion"] for row in rows)
    assert endings.most_common(1)[0][1] < 0.35 * len(rows)
    assert list(stdlib_brackets(StdlibBracketsSource()))[:50] == list(stdlib_brackets(StdlibBracketsSource()))[:50]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("value = call(first, second)", ("value = call(first, second", ")")),
        ("value = call(first", None),
        ("value = call(first]", None),
        ("value = call()", None),
        ("value = call('text')", None),
        ("value = call(first)  # why", None),
        ("f(x)", None),
    ],
)
def test_which_lines_are_cut(line: str, expected: tuple[str, str] | None) -> None:
    assert bracket_cut(line, "name") == expected


def test_a_cut_is_one_of_the_lines_closing_brackets() -> None:
    found = {bracket_cut("table[key] = {first: call(second[0])}", f"name {number}") for number in range(60)}
    assert found == {
        ("table[key", "]"),
        ("table[key] = {first: call(second[0", "])}"),
        ("table[key] = {first: call(second[0]", ")}"),
        ("table[key] = {first: call(second[0])", "}"),
    }
