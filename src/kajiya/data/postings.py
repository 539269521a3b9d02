"""Which documents hold which numbers: an inverted index whose memory is known before it is made."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_ENTRY_BYTES = 28
"""Of memory for each number of each document while the index is made; 12 stay."""


class NoRoomError(Exception):
    """The index would take more memory than it may."""


@dataclass(frozen=True)
class Postings:
    """Every number of every document, rising, and which document holds it; those of one number stand in rising order."""

    values: np.ndarray
    """uint64 [n]."""
    holders: np.ndarray
    """int32 [n]."""
    sizes: np.ndarray
    """Numbers of each document; int64 [documents]."""


def postings(found: Iterable[np.ndarray], most_bytes: int | None = None) -> Postings:
    """The index of each document's distinct numbers (uint64). Raises `NoRoomError` before it would take more than `most_bytes`."""
    gathered, sizes = array("Q"), array("q")
    for own in found:
        gathered.frombytes(own.tobytes())
        sizes.append(len(own))
        if most_bytes is not None and len(gathered) * _ENTRY_BYTES > most_bytes:
            raise NoRoomError
    unsorted, n_of_each = np.frombuffer(gathered, dtype=np.uint64), np.frombuffer(sizes, dtype=np.int64)
    order = np.argsort(unsorted, kind="stable")
    values = unsorted[order]
    del unsorted, gathered
    holders = np.repeat(np.arange(len(n_of_each), dtype=np.int32), n_of_each)[order]
    return Postings(values, holders, n_of_each)
