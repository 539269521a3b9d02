"""Near-duplicates by shared lines, through an inverted index over the held-out documents' lines."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kajiya.data.digests import short_digest
from kajiya.data.documents import cumulated
from kajiya.data.postings import postings

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
    """For each distinct line, as a 64-bit digest, the documents that hold it.

    Memory: 12 bytes for each distinct line of each held-out document, and 28 while it is made. Raises `NoRoomError` where that
    is more than `most_bytes`.
    """

    def __init__(self, texts: Iterable[str], few_lines_of_text: int = 0, most_bytes: int | None = None) -> None:
        """`few_lines_of_text`: a text that is compared counts as at least this long, too."""
        self._few_lines = few_lines_of_text
        held = postings(map(_digests, texts), most_bytes)
        self._digests, self._holders, self._n_lines = held.values, held.holders, held.sizes

    def nearest(self, text: str, at_least: float) -> Match | None:
        """The document with the largest share of lines in common with `text`, or `None` when it is below `at_least`.

        The share is |A ∩ B| / min(|A|, max(|B|, 20)), with A the text's and B the document's distinct lines.
        """
        own = _digests(text)
        n_lines = max(self._few_lines, len(own))
        low, high = (np.searchsorted(self._digests, own, side=side) for side in ("left", "right"))
        found = np.flatnonzero(high > low)
        if not len(found):
            return None
        found = found[np.argsort((high - low)[found], kind="stable")]
        low, high = low[found], high[found]
        # A match shares at least this many lines, so it holds one of the others, however few of the commonest lines are
        # looked up; those (`else:`, `}`) are in so many documents that they would cost the most (prefix filtering,
        # Chaudhuri et al., A primitive operator for similarity joins in data cleaning, ICDE 2006).
        needed = max(1, int(at_least * min(n_lines, FEW_LINES)))
        n_rare = max(0, len(found) - needed + 1)
        spans = (high - low)[:n_rare]
        places = np.repeat(low[:n_rare] - cumulated(spans)[:-1], spans) + np.arange(int(spans.sum()))
        candidates, counts = np.unique(self._holders[places], return_counts=True)
        shorter = np.minimum(n_lines, np.maximum(self._n_lines[candidates], FEW_LINES))
        may_match = (counts + len(found) - n_rare) / shorter >= at_least
        best: Match | None = None
        for index, count, size in zip(
            *(each[may_match].tolist() for each in (candidates, counts, shorter)), strict=True
        ):
            common = sum(self._is_held(index, *span) for span in zip(low[n_rare:], high[n_rare:], strict=True))
            share = (count + common) / size
            if share >= at_least and (best is None or share > best.share):
                best = Match(index, share)
        return best

    def _is_held(self, index: int, low: int, high: int) -> bool:
        """Whether the document holds the line whose holders stand from `low` to before `high`."""
        holders = self._holders[low:high]
        at = int(np.searchsorted(holders, index))
        return at < len(holders) and int(holders[at]) == index


def _digests(text: str) -> np.ndarray:
    """The distinct lines of a text as uint64, rising."""
    lines = distinct_lines(text)
    raw = b"".join(short_digest(line) for line in lines)
    return np.sort(np.frombuffer(raw, dtype="<u8"))


def distinct_lines(text: str) -> set[str]:
    """The distinct lines of a text that are not blank, without the white space around them."""
    return {stripped for line in text.split("\n") if (stripped := line.strip())}
