"""Near-duplicates by shared lines: exact, through an inverted index over the held-out documents' lines."""

from bisect import bisect_left
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

    def __init__(self, texts: Iterable[str], few_lines_of_text: int = 0) -> None:
        """`few_lines_of_text`: a text that is compared counts as at least this long, too."""
        self._few_lines = few_lines_of_text
        self._holders: dict[str, list[int]] = {}
        self._n_lines: list[int] = []
        for index, text in enumerate(texts):
            lines = distinct_lines(text)
            self._n_lines.append(len(lines))
            for line in lines:
                self._holders.setdefault(line, []).append(index)

    def nearest(self, text: str, at_least: float) -> Match | None:
        """The document with the largest share of lines in common with `text`, or `None` when it is below `at_least`.

        The share is |A ∩ B| / min(|A|, max(|B|, 20)), with A the text's and B the document's distinct lines.
        """
        n_lines = max(self._few_lines, len(distinct := distinct_lines(text)))
        found = sorted((self._holders[line] for line in distinct if line in self._holders), key=len)
        # A match shares at least this many lines, so it holds one of the others, however few of the commonest lines are
        # looked up; those (`else:`, `}`) are in so many documents that they would cost the most (prefix filtering,
        # Chaudhuri et al., A primitive operator for similarity joins in data cleaning, ICDE 2006).
        needed = max(1, int(at_least * min(n_lines, FEW_LINES)))
        n_rare = max(0, len(found) - needed + 1)
        shared: dict[int, int] = {}
        for holders in found[:n_rare]:
            for index in holders:
                shared[index] = shared.get(index, 0) + 1
        best: Match | None = None
        for index, count in sorted(shared.items()):
            shorter = min(n_lines, max(self._n_lines[index], FEW_LINES))
            if (count + len(found) - n_rare) / shorter < at_least:
                continue
            share = (count + sum(_holds(holders, index) for holders in found[n_rare:])) / shorter
            if share >= at_least and (best is None or share > best.share):
                best = Match(index, share)
        return best


def _holds(holders: list[int], index: int) -> bool:
    """Whether the sorted list holds the index."""
    at = bisect_left(holders, index)
    return at < len(holders) and holders[at] == index


def distinct_lines(text: str) -> set[str]:
    """The distinct lines of a text that are not blank, without the white space around them."""
    return {stripped for line in text.split("\n") if (stripped := line.strip())}
