"""Rows for rewards: lines of real code up to the brackets that end them, and these brackets."""

import hashlib
import re
from collections.abc import Iterator, Mapping

from kajiya.config.options import StdlibBracketsSource, StdlibSource
from kajiya.data.entries import Document, Found, Row
from kajiya.data.sources import stdlib

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_ENDING = re.compile(r"[)\]}]+:?$")
_LEAST_CHARS = 8
_ONE_IN: Mapping[str, int] = {"):": 10, ")": 10, "))": 8, "]": 2}
"""Of the most frequent endings one in so many is taken, so that none is right for a third of the rows."""


def stdlib_brackets(options: StdlibBracketsSource) -> Iterator[Found]:
    """A row for lines of the files of the source `stdlib`, named `file:line`; a file is a group.

    `prompt` is a line up to the closing brackets that end it, `completion` these brackets, with the colon behind them where there
    is one. Lines with strings, comments or brackets that reach over several lines are left out.
    """
    for entry in stdlib(StdlibSource(options.root)):
        if not isinstance(entry, Document):
            yield entry
            continue
        for number, line in enumerate(entry.text.split("\n"), start=1):
            name = f"{entry.name}:{number}"
            parts = before_brackets(line.strip()) if len(line.strip()) <= options.max_chars else None
            if parts is not None and _rank(name) % _ONE_IN.get(parts[1], 1) == 0:
                yield Row(name, {"prompt": parts[0], "completion": parts[1]}, group=entry.name)


def before_brackets(line: str) -> tuple[str, str] | None:
    """The line up to the closing brackets that end it, and these.

    `None` for a line that ends otherwise or with an empty pair, whose brackets are not all its own, or with a string or a comment.
    """
    if len(line) < _LEAST_CHARS or any(character in line for character in "'\"#\\"):
        return None
    open_now: list[str] = []
    for character in line:
        if character in _CLOSING:
            open_now.append(_CLOSING[character])
        elif character in _CLOSING.values() and (not open_now or open_now.pop() != character):
            return None
    found = _ENDING.search(line)
    if open_now or found is None or line[found.start() - 1] in "([{,":
        return None
    return line[: found.start()], found.group()


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="backslashreplace")).digest()[:8], "big")
