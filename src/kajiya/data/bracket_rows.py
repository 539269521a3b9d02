"""Rows for rewards: lines of real code that end within brackets, and the brackets that close them."""

import hashlib
from collections.abc import Iterator, Mapping

from kajiya.config.options import StdlibBracketsSource, StdlibSource
from kajiya.data.entries import Document, Found, Row
from kajiya.data.sources import stdlib

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LEAST_CHARS = 8
_ONE_IN: Mapping[str, int] = {")": 30, "]": 4}
"""Of the most frequent endings one in so many is taken, so that no ending is right for a third of the rows."""


def stdlib_brackets(options: StdlibBracketsSource) -> Iterator[Found]:
    """A row for lines of the files of the source `stdlib`, named `file:line`; a file is a group.

    `prompt` is a line up to before a closing bracket, `completion` all brackets that are open there, closed in their order.
    Lines with strings, comments or brackets that reach over several lines are left out.
    """
    for entry in stdlib(StdlibSource(options.root)):
        if not isinstance(entry, Document):
            yield entry
            continue
        for number, line in enumerate(entry.text.split("\n"), start=1):
            name = f"{entry.name}:{number}"
            cut = bracket_cut(line.strip(), name) if len(line.strip()) <= options.max_chars else None
            if cut is not None and _rank(name) % _ONE_IN.get(cut[1], 1) == 0:
                yield Row(name, {"prompt": cut[0], "completion": cut[1]}, group=entry.name)


def bracket_cut(line: str, name: str) -> tuple[str, str] | None:
    """The line up to before one of its closing brackets, chosen by a hash of the name, and what closes all that is open there.

    `None` for a line whose brackets are not all its own, that has none with something in them, or that has a string or a comment.
    """
    if len(line) < _LEAST_CHARS or any(character in line for character in "'\"#\\"):
        return None
    open_now: list[str] = []
    cuts = []
    for place, character in enumerate(line):
        if character in _CLOSING:
            open_now.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not open_now or open_now[-1] != character:
                return None
            if line[place - 1] not in "([{,":
                cuts.append((line[:place], "".join(reversed(open_now))))
            open_now.pop()
    return None if open_now or not cuts else cuts[_rank(f"{name} cut") % len(cuts)]


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="backslashreplace")).digest()[:8], "big")
