"""How often each token follows each other one, counted over the training documents."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kajiya.data.shards import open_split

_CHUNK_TOKENS = 4_194_304
_ENOUGH_TOKENS = 134_217_728
"""Counts of a first part this long say what the whole would."""


@dataclass(frozen=True)
class Bigrams:
    """Pairs of neighbouring tokens within a document, each once, with their count."""

    first: np.ndarray
    """Token ids, int64 [pairs]."""
    second: np.ndarray
    """The ids that follow, int64 [pairs]."""
    count: np.ndarray
    """How often, int64 [pairs]."""
    vocab_size: int


def count_bigrams(folder: Path, vocab_size: int) -> Bigrams:
    """Bigrams of the training split of the shards in `folder` (of its first 134M tokens where it is longer)."""
    split = open_split(folder, "train")
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    stop = min(split.n_tokens, _ENOUGH_TOKENS)
    for start in range(0, stop - 1, _CHUNK_TOKENS):
        tokens = split.read(start, min(start + _CHUNK_TOKENS + 1, stop)).astype(np.int64)
        # What follows an end-of-text token is another document's beginning.
        inside = tokens[:-1] != split.eos_id
        found, n = np.unique((tokens[:-1] * vocab_size + tokens[1:])[inside], return_counts=True)
        merged, place = np.unique(np.concatenate([keys, found]), return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate([counts, n]), minlength=len(merged)).astype(np.int64)
        keys = merged
    return Bigrams(keys // vocab_size, keys % vocab_size, counts, vocab_size)
