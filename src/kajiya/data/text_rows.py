"""Rows of text: the documents of an epoch one behind the other, cut where a row is full.

The epochs follow one another without a seam: place p of the endless stream holds tokens [p·T, p·T + T), so that the tokens
left over at the end of one epoch open the next, and none is lost. Each epoch begins with another document, so that the rows
are cut at other places.

Shape letters: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.order import permuted
from kajiya.data.shards import Split


class Rows(Protocol):
    """Rows by their place: place t · `n` + r holds row r in turn t."""

    @property
    def n(self) -> int:
        """Rows in a turn."""
        ...

    def batch(self, places: np.ndarray) -> Any:
        """The rows at these places (int64), as one batch."""
        ...

    def epoch(self, row: int) -> int:
        """Passes over the data that are behind the row given out as number `row`."""
        ...

    def documents(self, place: int) -> list[int]:
        """Numbers of the documents of the row at this place, in the order in which they lie in it."""
        ...

    def identity(self) -> dict[str, int]:
        """What the rows are a function of, beside the seed; a position counts for these rows alone."""
        ...

    def heaviest(self, n: int) -> np.ndarray:
        """Places of the `n` rows that take the most memory together (int64)."""
        ...


class TextRows:
    """Rows for training on text. The row at a place depends on (split, seed, T, place) and nothing else."""

    def __init__(self, split: Split, row_tokens: int, *, isolate: bool, seed: int) -> None:
        self.split = split
        self.row_tokens = row_tokens
        self.isolate = isolate
        self.seed = seed
        # The epoch of the last span, and the first of its documents: a look at a permutation for each row would be slow.
        self._first = (-1, 0)

    @property
    def n(self) -> int:
        """Rows until every token has been given out; the last of them ends in the next epoch."""
        return -(-self.split.n_tokens // self.row_tokens)

    def epoch(self, row: int) -> int:
        """Passes over the text that are behind row number `row`."""
        return row * self.row_tokens // self.split.n_tokens

    def identity(self) -> dict[str, int]:
        """As `Rows`'s."""
        return {
            "row_tokens": self.row_tokens,
            "n_documents": self.split.n_documents,
            "n_tokens": self.split.n_tokens,
        }

    def heaviest(self, n: int) -> np.ndarray:
        """All are of one length."""
        return np.arange(n)

    def batch(self, places: np.ndarray) -> Batch:
        """The rows at these places."""
        starts = (places * self.row_tokens).tolist()
        # One token more, the target of the last.
        spans = [self._span(start, start + self.row_tokens + 1) for start in starts]
        tokens, begins, sources = (np.stack(parts) for parts in zip(*spans, strict=True))
        return text_batch(tokens, begins, sources, self.isolate)

    def documents(self, place: int) -> list[int]:
        """As `Rows`'s."""
        spans = self._sources(place * self.row_tokens, (place + 1) * self.row_tokens)
        return [index for _, source, n in spans for index in documents_between(self.split, source, source + n)]

    def first_document(self, epoch: int) -> int:
        """The document that the epoch begins with; those behind it follow, and then those before it."""
        known, first = self._first
        if known != epoch:
            # Another stream of random numbers than the order of the rows has: the seed is turned over.
            found = permuted(np.zeros(1, dtype=np.int64), self.split.n_documents, ~self.seed % 2**64, epoch)
            first = int(found[0])
            self._first = (epoch, first)
        return first

    def _span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the endless stream from `start` to before `stop`: tokens (int64), document beginnings (bool), places in the split."""
        tokens, sources = np.empty((2, stop - start), dtype=np.int64)
        begins = np.zeros(stop - start, dtype=np.bool_)
        for at, source, n in self._sources(start, stop):
            part = slice(at - start, at - start + n)
            tokens[part] = self.split.read(source, source + n)
            sources[part] = np.arange(source, source + n)
            begins[part][document_starts(self.split, source, source + n)] = True
        return tokens, begins, sources

    def _sources(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The stream from `start` to before `stop` as (place in it, place in the split's tokens, length)."""
        n_tokens = self.split.n_tokens
        at = start
        while at < stop:
            epoch, inside = divmod(at, n_tokens)
            source = (int(self.split.offsets[self.first_document(epoch)]) + inside) % n_tokens
            n = min(stop - at, n_tokens - inside, n_tokens - source)
            yield at, source, n
            at += n


class HeldoutText:
    """Rows of the held-out text in its own order, cut as for training; the last is filled up with end-of-text."""

    def __init__(self, split: Split, row_tokens: int, *, isolate: bool) -> None:
        self.split = split
        self.row_tokens = row_tokens
        self.isolate = isolate

    @property
    def n(self) -> int:
        """Rows of the whole text; the first token of all is no target."""
        return -(-(self.split.n_tokens - 1) // self.row_tokens)

    def epoch(self, row: int) -> int:
        """As `Rows`'s."""
        return row // self.n

    def identity(self) -> dict[str, int]:
        """As `Rows`'s."""
        return {"row_tokens": self.row_tokens, "n_tokens": self.split.n_tokens}

    def heaviest(self, n: int) -> np.ndarray:
        """All are of one length."""
        return np.arange(n)

    def batch(self, places: np.ndarray) -> Batch:
        """The rows at these places."""
        spans = [self._span(place * self.row_tokens) for place in (places % self.n).tolist()]
        tokens, begins, sources = (np.stack(parts) for parts in zip(*spans, strict=True))
        return text_batch(tokens, begins, sources, self.isolate)

    def documents(self, place: int) -> list[int]:
        """As `Rows`'s."""
        start = place % self.n * self.row_tokens
        return documents_between(self.split, start, min(start + self.row_tokens, self.split.n_tokens))

    def _span(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, document beginnings, and places in the split (−1 behind its end), from `start`; each [T + 1]."""
        stop = min(start + self.row_tokens + 1, self.split.n_tokens)
        tokens = np.full(self.row_tokens + 1, self.split.eos_id, dtype=np.int64)
        sources = np.full(self.row_tokens + 1, -1, dtype=np.int64)
        begins = np.zeros(self.row_tokens + 1, dtype=np.bool_)
        tokens[: stop - start] = self.split.read(start, stop)
        sources[: stop - start] = np.arange(start, stop)
        begins[document_starts(self.split, start, stop)] = True
        if stop - start < len(tokens):
            begins[stop - start] = True
        return tokens, begins, sources


def document_starts(split: Split, start: int, stop: int) -> np.ndarray:
    """Where documents begin among the tokens from `start` to before `stop`, counted from `start`; int64."""
    low, high = np.searchsorted(split.offsets, (start, stop))
    return split.offsets[low:high] - start


def documents_between(split: Split, start: int, stop: int) -> list[int]:
    """Numbers of the documents that some of the tokens from `start` to before `stop` are of."""
    first = int(np.searchsorted(split.offsets, start, side="right")) - 1
    return list(range(first, int(np.searchsorted(split.offsets, stop, side="left"))))


def text_batch(tokens: np.ndarray, begins: np.ndarray, sources: np.ndarray, isolate: bool) -> Batch:
    """The batch of these tokens [B, T + 1], the last of each row a target only; `begins` marks documents' first tokens.

    `sources` are their places in the split; what has none (−1) is no target.
    """
    tokens_BT, begins_BT = tokens[:, :-1], begins[:, :-1]
    targets_BT = tokens[:, 1:].copy()
    column_T = np.arange(tokens_BT.shape[1], dtype=np.int64)
    if isolate:
        targets_BT[begins[:, 1:]] = NO_TARGET
        # A document that goes on from an earlier row is a segment of its own here, from position 0.
        begins_BT = begins_BT.copy()
        begins_BT[:, 0] = True
        segments_BT = np.cumsum(begins_BT, axis=1, dtype=np.int64) - 1
        positions_BT = column_T - np.maximum.accumulate(np.where(begins_BT, column_T, 0), axis=1)
    else:
        segments_BT = np.zeros_like(targets_BT)
        positions_BT = np.broadcast_to(column_T, targets_BT.shape).copy()
    targets_BT[sources[:, 1:] < 0] = NO_TARGET
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens_BT)),
        targets=torch.from_numpy(targets_BT),
        positions=torch.from_numpy(positions_BT),
        segments=torch.from_numpy(segments_BT),
        n_targets=int((targets_BT != NO_TARGET).sum()),
        sources=torch.from_numpy(np.ascontiguousarray(sources[:, :-1])),
    )
