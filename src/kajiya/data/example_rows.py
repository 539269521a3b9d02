"""Rows of whole examples: several in a row (packed), or one sequence a row (padded to the longest of the batch).

Shape letters: B rows of a batch, T tokens of a row, S sequences, E examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, Seq2SeqBatch
from kajiya.data.pack import Packing
from kajiya.data.shards import Split

_MULTIPLE = 8
"""Padded rows are of a multiple of this many tokens, which kernels like."""


@dataclass(frozen=True)
class ExampleKind:
    """What the batches of examples are like."""

    keeps_examples: bool
    """Whether the batch says which sequence belongs to which example (`ExampleBatch`), or only holds tokens (`Batch`)."""
    is_causal: bool = True
    """Of a `Batch`."""


class PackedRows:
    """Rows of several examples each, which do not see each other."""

    def __init__(self, split: Split, packing: Packing, row_tokens: int, kind: ExampleKind) -> None:
        self.split = split
        self.packing = packing
        self.row_tokens = row_tokens
        self.kind = kind

    @property
    def n(self) -> int:
        """Rows in a turn."""
        return len(self.packing.rows) - 1

    def epoch(self, row: int) -> int:
        """As `Rows`'s."""
        return row // self.n

    def identity(self) -> dict[str, int]:
        """As `Rows`'s."""
        return {"row_tokens": self.row_tokens, "n_rows": self.n, "n_examples": len(self.packing.examples)}

    def documents(self, place: int) -> list[int]:
        """As `Rows`'s."""
        found = self.packing.examples[slice(*self.packing.rows[place % self.n :][:2].tolist())]
        return [int(index) for index in found]

    def heaviest(self, n: int) -> np.ndarray:
        """Those with the most examples, and the one with the longest sequence: heads over whole texts pad all to its length."""
        begins = self.packing.rows[:-1]
        longest = int(np.maximum.reduceat(self.packing.lengths.max(axis=1), begins).argmax())
        return _first(n, [longest], np.argsort(-np.diff(self.packing.rows), kind="stable"))

    def batch(self, places: np.ndarray) -> Batch | ExampleBatch:
        """The rows at these places."""
        canvas = _Canvas(self.split, len(places), self.row_tokens)
        for row, place in enumerate((places % self.n).tolist()):
            for index in range(*self.packing.rows[place : place + 2].tolist()):
                canvas.add([row] * self.split.segments, self.packing, index)
        return canvas.finish(self.kind)


class PaddedRows:
    """Each sequence in a row of its own, the rows as long as the longest of the batch; for models that cannot isolate.

    A row number stands for an example, whose k sequences are k rows.
    """

    def __init__(self, split: Split, packing: Packing, kind: ExampleKind) -> None:
        self.split = split
        self.packing = packing
        self.kind = kind

    @property
    def n(self) -> int:
        """Examples in a turn."""
        return len(self.packing.examples)

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of the longest sequence of each of these examples; int64."""
        return np.asarray(self.packing.lengths[places].max(axis=1))

    @cached_property
    def _n_tokens(self) -> int:
        return int(self.packing.lengths.sum())

    def epoch(self, row: int) -> int:
        """As `Rows`'s."""
        return row // self.n

    def identity(self) -> dict[str, int]:
        """As `Rows`'s."""
        return {"n_examples": self.n, "n_tokens": self._n_tokens}

    def documents(self, place: int) -> list[int]:
        """As `Rows`'s."""
        return [int(self.packing.examples[place % self.n])]

    def heaviest(self, n: int) -> np.ndarray:
        """The longest."""
        return _first(n, np.argsort(-self.packing.lengths.max(axis=1), kind="stable"))

    def batch(self, places: np.ndarray) -> Batch | ExampleBatch:
        """The examples at these places."""
        indices = places % self.n
        kept = self.packing.lengths[indices]
        canvas = _Canvas(self.split, kept.size, _rounded(int(kept.max())))
        for number, index in enumerate(indices.tolist()):
            first = number * self.split.segments
            canvas.add(list(range(first, first + self.split.segments)), self.packing, index)
        return canvas.finish(self.kind)


class PairRows:
    """Input and target of an encoder-decoder, one pair a row, padded to the longest of the batch."""

    def __init__(self, split: Split, packing: Packing, start_id: int) -> None:
        self.split = split
        self.packing = packing
        self.start_id = start_id

    @property
    def n(self) -> int:
        """Pairs in a turn."""
        return len(self.packing.examples)

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of each of these pairs; int64."""
        return np.asarray(self.packing.lengths[places].sum(axis=1))

    @cached_property
    def _n_tokens(self) -> int:
        return int(self.packing.lengths.sum())

    def epoch(self, row: int) -> int:
        """As `Rows`'s."""
        return row // self.n

    def identity(self) -> dict[str, int]:
        """As `Rows`'s."""
        return {"n_examples": self.n, "n_tokens": self._n_tokens}

    def documents(self, place: int) -> list[int]:
        """As `Rows`'s."""
        return [int(self.packing.examples[place % self.n])]

    def heaviest(self, n: int) -> np.ndarray:
        """Those with the longest input and the longest target, to which all are padded."""
        lengths = self.packing.lengths
        return _first(n, lengths.argmax(axis=0), np.argsort(-lengths.sum(axis=1), kind="stable"))

    def batch(self, places: np.ndarray) -> Seq2SeqBatch:
        """The pairs at these places; the decoder reads its start token and then each target but the last."""
        indices = places % self.n
        kept = self.packing.lengths[indices]
        n_inputs, n_targets = (_rounded(int(longest)) for longest in kept.max(axis=0))
        inputs = np.full((len(places), n_inputs), self.split.pad_id, dtype=np.int64)
        tokens = np.full((len(places), n_targets), self.split.pad_id, dtype=np.int64)
        targets = np.full_like(tokens, NO_TARGET)
        for row, index in enumerate(indices.tolist()):
            read, said = self.packing.starts[index].tolist()
            n, m = kept[row].tolist()
            inputs[row, :n] = self.split.read(read, read + n)
            ids = self.split.read(said, said + m).astype(np.int64)
            weights = self.split.read_weights(said, said + m)
            tokens[row, 0] = self.start_id
            tokens[row, 1:m] = ids[:-1]
            targets[row, :m] = ids
            # The weight of a first token is not kept for any kind of row: behind the start token it is always a target.
            targets[row, 1:m][weights[1:] == 0] = NO_TARGET
        return Seq2SeqBatch(
            inputs=torch.from_numpy(inputs),
            inputs_mask=torch.arange(n_inputs)[None, :] < torch.from_numpy(kept[:, :1].copy()),
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            n_targets=int((targets != NO_TARGET).sum()),
            examples=torch.from_numpy(self.packing.examples[indices].astype(np.int64)),
        )


def _first(n: int, *places: Sequence[int] | np.ndarray) -> np.ndarray:
    """The first `n` places, each once; all are repeated where there are fewer."""
    known = list(dict.fromkeys(int(place) for part in places for place in part[: n + 1]))
    return np.array([known[index % len(known)] for index in range(n)], dtype=np.int64)


def _rounded(n_tokens: int) -> int:
    return -(-n_tokens // _MULTIPLE) * _MULTIPLE


class _Canvas:
    """Rows being filled with sequences."""

    def __init__(self, split: Split, n_rows: int, row_tokens: int) -> None:
        self._split = split
        shape = (n_rows, row_tokens)
        self._tokens = np.full(shape, split.pad_id, dtype=np.int64)
        self._targets = np.full(shape, NO_TARGET, dtype=np.int64)
        self._weights = np.zeros(shape, dtype=np.float32)
        self._positions = np.zeros(shape, dtype=np.int64)
        self._segments = np.zeros(shape, dtype=np.int64)
        self._owner, self._sources = np.full((2, *shape), -1, dtype=np.int64)
        self._last: list[int] = []
        self._examples: list[int] = []
        self._filled = [0] * n_rows
        self._n_segments = [0] * n_rows

    def add(self, rows: list[int], packing: Packing, index: int) -> None:
        """Put the sequences of an example each into one of these rows."""
        self._examples.append(int(packing.examples[index]))
        for row, start, n in zip(rows, packing.starts[index].tolist(), packing.lengths[index].tolist(), strict=True):
            self._put(row, start, n)

    def _put(self, row: int, source: int, n: int) -> None:
        at = self._filled[row]
        self._tokens[row, at : at + n] = self._split.read(source, source + n)
        # A target stands one place before its token, within the sequence.
        self._targets[row, at : at + n - 1] = self._tokens[row, at + 1 : at + n]
        if self._split.has_weights:
            self._weights[row, at : at + n - 1] = self._split.read_weights(source + 1, source + n)
        self._positions[row, at : at + n] = np.arange(n)
        self._segments[row, at : at + n] = self._n_segments[row]
        self._owner[row, at : at + n] = len(self._last)
        self._sources[row, at : at + n] = np.arange(source, source + n)
        self._last.append(row * self._tokens.shape[1] + at + n - 1)
        self._filled[row] += n
        self._n_segments[row] += 1

    def finish(self, kind: ExampleKind) -> Batch | ExampleBatch:
        """The batch; what is left of each row is a segment of its own, without targets."""
        for row, (filled, number) in enumerate(zip(self._filled, self._n_segments, strict=True)):
            self._segments[row, filled:] = number
            self._positions[row, filled:] = np.arange(self._tokens.shape[1] - filled)
        if self._split.has_weights:
            self._targets[self._weights == 0] = NO_TARGET
        rows = Batch(
            tokens=torch.from_numpy(self._tokens),
            targets=torch.from_numpy(self._targets),
            positions=torch.from_numpy(self._positions),
            segments=torch.from_numpy(self._segments),
            n_targets=int((self._targets != NO_TARGET).sum()),
            weights=torch.from_numpy(self._weights) if self._split.weighs else None,
            is_causal=kind.is_causal,
            sources=torch.from_numpy(self._sources),
        )
        if not kind.keeps_examples:
            return rows
        examples = np.array(self._examples, dtype=np.int64)
        return ExampleBatch(
            rows=rows,
            owner=torch.from_numpy(self._owner),
            last=torch.tensor(self._last),
            examples=torch.from_numpy(examples),
            labels=None if self._split.labels is None else _labels(self._split.labels[examples]),
        )


def _labels(labels: np.ndarray) -> torch.Tensor:
    """Classes as int64, values as float32."""
    return torch.from_numpy(labels if labels.dtype == np.int64 else labels.astype(np.float32))
