"""Near-duplicates by shared lines: exact, through an inverted index over the held-out documents' lines."""

from collections.abc import Iterable
from dataclasses import dataclass

FEW_LINES = 20
"""A held-out document counts as at least this long, so that a trivial one (`import os`) does not claim every file."""


@dataclass(frozen=True)
class Match:
    """The held-out document nearest to a text."""

    index: int
    """Its place among the held-out documents."""
    share: float
    """Shared lines over the lines of the shorter document."""


class LineIndex:
    """For each distinct line, the documents that hold it. Memory grows with the held-out text alone."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._holders: dict[str, list[int]] = {}
        self._n_lines: list[int] = []
        for index, text in enumerate(texts):
            lines = distinct_lines(text)
            self._n_lines.append(len(lines))
            for line in lines:
                self._holders.setdefault(line, []).append(index)

    def nearest(self, text: str) -> Match | None:
        """The document with the largest share of lines in common with `text`; `None` when no line is shared.

        The share is |A ∩ B| / min(|A|, max(|B|, 20)), with A the text's and B the document's distinct lines.
        """
        lines = distinct_lines(text)
        shared: dict[int, int] = {}
        for line in lines:
            for index in self._holders.get(line, ()):
                shared[index] = shared.get(index, 0) + 1
        best: Match | None = None
        for index, count in sorted(shared.items()):
            share = count / min(len(lines), max(self._n_lines[index], FEW_LINES))
            if best is None or share > best.share:
                best = Match(index, share)
        return best


def distinct_lines(text: str) -> set[str]:
    """The distinct lines of a text that are not blank, without the white space around them."""
    return {stripped for line in text.split("\n") if (stripped := line.strip())}
