"""Where the sequences of the shards lie in the rows of a batch, by the places that its tokens say they are from.

Shape letters: B rows, T tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from kajiya.data.batch import Batch
from kajiya.data.shards import Split


@dataclass(frozen=True)
class Place:
    """Tokens of a row, from `start` to before `stop`, that are one segment of a sequence of the shards."""

    row: int
    start: int
    stop: int
    sequence: int
    """Its number within the split; sequence j of document d is d · k + j."""
    is_whole: bool
    """Whether the sequence begins and ends here: nothing was cut off."""


def places(rows: Batch, split: Split) -> Iterator[Place]:
    """Every segment of the rows that holds tokens of the split."""
    if rows.sources is None:
        return
    sources_BT = rows.sources.numpy()
    for row, segments_T in enumerate(rows.segments.numpy()):
        edges = [0, *(np.flatnonzero(np.diff(segments_T)) + 1).tolist(), len(segments_T)]
        for start, stop in pairwise(edges):
            source = int(sources_BT[row, start])
            if source < 0:
                continue
            sequence = int(np.searchsorted(split.offsets, source, side="right")) - 1
            whole = (source, source + stop - start) == tuple(split.offsets[sequence : sequence + 2].tolist())
            yield Place(row, start, stop, sequence, whole)


def are_last(rows: Batch, split: Split) -> torch.Tensor:
    """Which tokens are the last of a sequence of the split, bool [B, T]."""
    if rows.sources is None:
        return torch.zeros_like(rows.tokens, dtype=torch.bool)
    return torch.from_numpy(np.isin(rows.sources.numpy() + 1, split.offsets[1:]))


def n_astray(rows: Batch, split: Split) -> int:
    """Neighbouring tokens that share a segment and should not, or should and do not, or whose positions say otherwise."""
    if rows.sources is None:
        return 0
    sources_BT = rows.sources.numpy()
    sequence_BT = np.where(sources_BT < 0, -1, np.searchsorted(split.offsets, sources_BT, side="right") - 1)
    follows = (sources_BT[:, 1:] == sources_BT[:, :-1] + 1) | (sources_BT[:, 1:] < 0)
    goes_on = torch.from_numpy((sequence_BT[:, 1:] == sequence_BT[:, :-1]) & follows)
    is_same = rows.segments[:, 1:] == rows.segments[:, :-1]
    expected = torch.where(goes_on, rows.positions[:, :-1] + 1, 0)
    return int(((is_same != goes_on) | (rows.positions[:, 1:] != expected)).sum())
