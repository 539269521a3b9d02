"""The order of documents: for every epoch a permutation that is a function of seed and epoch alone."""

from dataclasses import dataclass

import numpy as np

from kajiya.data.documents import cumulated


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `n` things, int64 [n].

    Sorted by raw Philox numbers: NumPy promises that these stay the same from version to version, which it does not for
    `Generator.permutation`. (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.)
    """
    numbers = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(n)
    order = np.argsort(numbers)
    # Numbers that are all different have one sorted order, whichever algorithm finds it; the fast ones are not stable.
    ranked = numbers[order]
    return order if bool((ranked[1:] != ranked[:-1]).all()) else np.argsort(numbers, kind="stable")


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents."""

    documents: np.ndarray
    """Documents in the order of this epoch; int64 [n]."""
    starts: np.ndarray
    """Where each of them begins in the epoch's tokens, and the end; int64 [n + 1]."""


def epoch_order(offsets: np.ndarray, seed: int, epoch: int) -> Epoch:
    """The order of one epoch over documents that lie at `offsets` (int64 [n + 1])."""
    documents = permutation(len(offsets) - 1, seed, epoch)
    return Epoch(documents, cumulated((offsets[1:] - offsets[:-1])[documents]))
