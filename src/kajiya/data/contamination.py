"""Contamination: training documents that hold word sequences of the held-out ones."""

from collections.abc import Iterable

import numpy as np

from kajiya.data.documents import cumulated
from kajiya.data.duplicates import Match
from kajiya.data.shingles import shingles


class HeldoutSequences:
    """Every sequence of `n_words` words of the held-out documents, and which of them hold it.

    A held-out document of fewer words is one sequence, which only a text of the same words holds.
    Memory: 16 bytes for each word of the held-out text.
    (Brown et al., arXiv:2005.14165, appendix C, take 13 words.)
    """

    def __init__(self, texts: Iterable[str], n_words: int) -> None:
        self._n_words = n_words
        found = [shingles(text, n_words) for text in texts]
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *found])
        order = np.argsort(hashes, kind="stable")
        self._sizes = np.array([len(each) for each in found], dtype=np.int64)
        self._hashes = hashes[order]
        self._holders = np.repeat(np.arange(len(found)), self._sizes)[order]

    def nearest(self, text: str, more_than: float) -> Match | None:
        """The held-out document of whose sequences the text holds the largest share, if that is above `more_than`."""
        own = shingles(text, self._n_words)
        low, high = (np.searchsorted(self._hashes, own, side=side) for side in ("left", "right"))
        spans = high - low
        if not spans.any():
            return None
        # Every place from `low` to before `high`, for all sequences at once.
        places = np.repeat(low - cumulated(spans)[:-1], spans) + np.arange(int(spans.sum()))
        counts = np.bincount(self._holders[places], minlength=len(self._sizes))
        shares = counts / np.maximum(1, self._sizes)
        best = int(np.argmax(shares))
        return Match(best, float(shares[best])) if shares[best] > more_than else None
