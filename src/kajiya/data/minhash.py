"""Near-duplicates among many documents: MinHash finds the likely pairs, their word sequences decide.

Signatures and buckets lie in files, so that memory grows by some 30 bytes a document, whatever the documents' length.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from kajiya.data.duplicates import Match
from kajiya.data.shingles import shingles

_N_HASHES = 128
_CHUNK = 4096
_SURE = 0.99
MOST_IN_BUCKET = 100
"""Documents of one bucket that one is compared with, the latest: boilerplate would otherwise cost the square of its number."""


class NearDuplicates:
    """Finds, for one document after another, an earlier kept one whose word sequences are nearly the same.

    The similarity is Jaccard's, |A ∩ B| / |A ∪ B| over distinct sequences of `n_words` words, and exact. Pairs are found by
    MinHash and banding (Broder, 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3): of those at the
    threshold at least 99 % are found, of more similar ones more; none is found that is below it. Of a bucket that holds more than
    100 earlier kept documents, the latest 100 alone are looked at: `n_limited` counts the documents for which that was so.
    """

    def __init__(self, text: Callable[[int], str], n: int, *, threshold: float, n_words: int, folder: Path) -> None:
        """`text(i)` is the text of document i of `n`; working files lie in `folder` until `close`."""
        self._threshold = threshold
        self.n_limited = 0
        self._shingles = lru_cache(maxsize=1024)(lambda index: shingles(text(index), n_words))
        self._kept = np.zeros(n, dtype=np.bool_)
        n_rows = rows_of_a_band(threshold)
        self._files = [folder / "minhash.keys", folder / "minhash.before"]
        shape = (_N_HASHES // n_rows, n)
        keys: np.ndarray = np.memmap(self._files[0], dtype=np.uint64, mode="w+", shape=(shape[0], max(1, n)))
        for index in range(n):
            keys[:, index] = _band_keys(signature(shingles(text(index), n_words)), n_rows, index)
        # In each band, the document before this one with the same key, or -1.
        self._before: np.ndarray = np.memmap(self._files[1], dtype=np.int64, mode="w+", shape=(shape[0], max(1, n)))
        for band in range(shape[0]):
            order = np.argsort(keys[band, :n], kind="stable")
            ranked = keys[band, :n][order]
            before = np.full(n, -1, dtype=np.int64)
            before[order[1:]] = np.where(ranked[1:] == ranked[:-1], order[:-1], -1)
            self._before[band, :n] = before

    def keep(self, index: int) -> None:
        """Later documents are compared with this one."""
        self._kept[index] = True

    def nearest(self, index: int) -> Match | None:
        """The most similar kept document before this one, or `None` when none reaches the threshold."""
        own = self._shingles(index)
        best: Match | None = None
        for other in sorted(self._candidates(index)):
            others = self._shingles(other)
            n_shared = len(np.intersect1d(own, others, assume_unique=True))
            similarity = n_shared / (len(own) + len(others) - n_shared)
            if similarity >= self._threshold and (best is None or similarity > best.share):
                best = Match(other, similarity)
        return best

    def _candidates(self, index: int) -> set[int]:
        found: set[int] = set()
        is_limited = False
        for before in self._before:
            last, n_seen = index, 0
            while (at := self._kept_before(before, last)) >= 0 and n_seen < MOST_IN_BUCKET:
                found.add(at)
                last, n_seen = at, n_seen + 1
            is_limited |= at >= 0
        self.n_limited += is_limited
        return found

    def _kept_before(self, before: np.ndarray, index: int) -> int:
        """The last kept document of the bucket before this one; documents that were not kept are unlinked in passing."""
        at = int(before[index])
        while at >= 0 and not self._kept[at]:
            at = int(before[at])
        before[index] = at
        return at

    def close(self) -> None:
        """Delete the working files."""
        for path in self._files:
            path.unlink()


def signature(values: np.ndarray) -> np.ndarray:
    """The least of each of 128 hashes over the values, uint32 [128]; multiply-shift (Dietzfelbinger et al., 1997)."""
    factors, terms = _hashes()
    least = np.full(_N_HASHES, 2**32 - 1, dtype=np.uint64)
    for start in range(0, len(values), _CHUNK):
        hashed = (values[start : start + _CHUNK, None] * factors + terms) >> np.uint64(32)
        least = np.minimum(least, hashed.min(axis=0))
    return least.astype(np.uint32)


def rows_of_a_band(threshold: float) -> int:
    """The most hashes to a band with which 99 % of the pairs at the threshold share one: 1 − (1 − tʳ)^⌊128 / r⌋ ≥ 0.99."""
    fitting = (r for r in range(32, 1, -1) if 1 - (1 - threshold**r) ** (_N_HASHES // r) >= _SURE)
    return next(fitting, 1)


@lru_cache(maxsize=1)
def _hashes() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and terms, uint64 [128]. Raw Philox numbers stay the same from version to version of NumPy."""
    raw = np.random.Philox(key=np.array([0x6D696E, 0], dtype=np.uint64)).random_raw(2 * _N_HASHES)
    return raw[:_N_HASHES] | np.uint64(1), raw[_N_HASHES:]


def _band_keys(hashes: np.ndarray, n_rows: int, index: int) -> np.ndarray:
    """One number for each band of a signature, uint64; a document without words has keys that no other has."""
    n_bands = _N_HASHES // n_rows
    if (hashes == 2**32 - 1).all():
        return np.full(n_bands, index, dtype=np.uint64)
    bands = hashes[: n_bands * n_rows].reshape(n_bands, n_rows).astype(np.uint64)
    key = np.zeros(n_bands, dtype=np.uint64)
    for column in bands.T:
        key = (key + column + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key
