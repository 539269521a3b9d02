"""Contamination: training documents that hold word sequences of the held-out ones."""

from collections.abc import Iterable

import numpy as np

from kajiya.data.documents import cumulated
from kajiya.data.duplicates import Match
from kajiya.data.postings import postings
from kajiya.data.shingles import shingles


class HeldoutSequences:
    """Every sequence of `n_words` words of the held-out documents, and which of them hold it.

    A held-out document of fewer words is one sequence, which only a text of the same words holds.
    Memory: 12 bytes for each word of the held-out text, and 28 while it is made. Raises `NoRoomError` where that is more than
    `most_bytes`. (Brown et al., arXiv:2005.14165, appendix C, take 13 words.)
    """

    def __init__(self, texts: Iterable[str], n_words: int, most_bytes: int | None = None) -> None:
        self._n_words = n_words
        self._held = postings((shingles(text, n_words) for text in texts), most_bytes)

    def nearest(self, text: str, more_than: float) -> Match | None:
        """The held-out document of whose sequences the text holds the largest share, if that is above `more_than`."""
        own = shingles(text, self._n_words)
        low, high = (np.searchsorted(self._held.values, own, side=side) for side in ("left", "right"))
        spans = high - low
        if not spans.any():
            return None
        # Every place from `low` to before `high`, for all sequences at once.
        places = np.repeat(low - cumulated(spans)[:-1], spans) + np.arange(int(spans.sum()))
        counts = np.bincount(self._held.holders[places], minlength=len(self._held.sizes))
        shares = counts / np.maximum(1, self._held.sizes)
        best = int(np.argmax(shares))
        return Match(best, float(shares[best])) if shares[best] > more_than else None
