"""Rows for training: documents in each epoch's order, concatenated, cut, and the rows shuffled; any is found at once.

The epochs follow one another without a seam: place p of the endless stream holds tokens [p·T, p·T + T), so that the tokens
left over at the end of one epoch open the next, and none is lost. The places of about an epoch are given out in a random
order, so that a batch holds rows of many documents.

Shape letters: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.order import Epoch, epoch_order, permutation
from kajiya.data.shards import Split, open_split
from kajiya.errors import StoreError


class Loader:
    """Batches of rows. The position is one number, and the row at a position depends on nothing else.

    A row of the stream is the same whatever the batch size: its content is a function of (split, seed, T, row).
    """

    def __init__(self, split: Split, *, row_tokens: int, rows: int, seed: int, isolate: bool) -> None:
        self.split = split
        self.row_tokens = row_tokens
        self.rows = rows
        self.seed = seed
        self.isolate = isolate
        self.row = 0
        """Rows given out since the beginning; the next batch begins with this one."""
        self._epochs: dict[int, Epoch] = {}
        self._shuffles: dict[int, np.ndarray] = {}

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every token has been given out; the last of them ends in the next epoch."""
        return -(-self.split.n_tokens // self.row_tokens)

    @property
    def epoch(self) -> int:
        """Passes over the text that are behind the next row."""
        return self.row * self.row_tokens // self.split.n_tokens

    def place(self, row: int) -> int:
        """Place in the stream of row number `row`: a permutation of every `rows_per_epoch` places."""
        turn, index = divmod(row, self.rows_per_epoch)
        if turn not in self._shuffles:
            # Another stream of random numbers than the documents' order has: the seed is turned over.
            shuffle = permutation(self.rows_per_epoch, ~self.seed % 2**64, turn)
            self._shuffles = {old: order for old, order in self._shuffles.items() if old == turn - 1} | {turn: shuffle}
        return turn * self.rows_per_epoch + int(self._shuffles[turn][index])

    def next(self) -> Batch:
        """The next B rows."""
        batch = self.at(self.row)
        self.row += self.rows
        return batch

    def at(self, row: int) -> Batch:
        """The B rows from number `row` on; the position stays."""
        starts = [self.place(number) * self.row_tokens for number in range(row, row + self.rows)]
        # One token more, the target of the last.
        spans = [self._span(start, start + self.row_tokens + 1) for start in starts]
        tokens, begins = (np.stack(parts) for parts in zip(*spans, strict=True))
        return _batch(tokens[:, :-1], tokens[:, 1:], begins[:, :-1], begins[:, 1:], self.isolate)

    def state(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"row": self.row, "epoch": self.epoch} | self._stream()

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from a `state`. Raises `StoreError` when it belongs to another stream of rows."""
        missing = (self._stream() | {"row": 0}).keys() - state.keys()
        if missing:
            raise StoreError(f"the saved data position lacks {', '.join(sorted(missing))}: it is no loader's state")
        for name, value in self._stream().items():
            if state[name] != value:
                raise StoreError(
                    f"the data position was saved at {name}={state[name]}, and here it is {name}={value}: the rows after "
                    "it would be others.\nGo on with the settings and the data of the saved run, or begin a new run."
                )
        self.row = state["row"]

    def _stream(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "row_tokens": self.row_tokens,
            "n_documents": self.split.n_documents,
            "n_tokens": self.split.n_tokens,
        }

    def _span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64) and document beginnings (bool) of the endless stream from `start` to before `stop`."""
        n_tokens = self.split.n_tokens
        tokens = np.empty(stop - start, dtype=np.int64)
        begins = np.zeros(stop - start, dtype=np.bool_)
        for number in range(start // n_tokens, -(-stop // n_tokens)):
            shift = number * n_tokens
            low, high = max(start - shift, 0), min(stop - shift, n_tokens)
            part = slice(low + shift - start, high + shift - start)
            self._fill(self._epoch(number), low, high, tokens[part], begins[part])
        return tokens, begins

    def _fill(self, epoch: Epoch, low: int, high: int, tokens: np.ndarray, begins: np.ndarray) -> None:
        """Write the epoch's tokens from `low` to before `high`."""
        first = int(np.searchsorted(epoch.starts, low, side="right")) - 1
        last = int(np.searchsorted(epoch.starts, high, side="left"))
        starts = epoch.starts[first : last + 1]
        sources = self.split.offsets[epoch.documents[first:last]]
        cut = np.clip(starts, low, high)
        from_ = (sources + cut[:-1] - starts[:-1]).tolist()
        to = (cut - low).tolist()
        for index, source in enumerate(from_):
            n = to[index + 1] - to[index]
            tokens[to[index] : to[index + 1]] = self.split.read(source, source + n)
        inside = starts[:-1] >= low
        begins[(starts[:-1] - low)[inside]] = True

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            # The places of one turn lie in two epochs, and a batch may touch two turns.
            self._epochs = {old: order for old, order in self._epochs.items() if abs(old - number) <= 2}
            self._epochs[number] = epoch_order(self.split.offsets, self.seed, number)
        return self._epochs[number]


def open_loader(folder: Path, split: str, *, row_tokens: int, rows: int, seed: int, isolate: bool) -> Loader:
    """The loader over a split (`train`, `heldout`) of the shards in `folder`: B = `rows`, T = `row_tokens`.

    With `isolate`, documents that share a row are segments of their own, positions restart in each, and no target
    reaches into the next document. Without, a row is one segment.
    """
    return Loader(open_split(folder, split), row_tokens=row_tokens, rows=rows, seed=seed, isolate=isolate)


def heldout_rows(folder: Path, *, row_tokens: int, rows: int, batch: int = 8, isolate: bool = True) -> Iterator[Batch]:
    """At most `rows` held-out rows, spread evenly over the held-out documents in their order, `batch` at a time.

    The same rows every time. A last row that the text does not fill is filled with end-of-text, without targets.
    """
    split = open_split(folder, "heldout")
    n_rows = -(-(split.n_tokens - 1) // row_tokens)
    n_chosen = min(rows, n_rows)
    chosen = [index * n_rows // n_chosen for index in range(n_chosen)]
    for first in range(0, n_chosen, batch):
        spans = [_heldout_span(split, row * row_tokens, row_tokens) for row in chosen[first : first + batch]]
        tokens, begins, filled = (np.stack(parts) for parts in zip(*spans, strict=True))
        yield _batch(tokens[:, :-1], tokens[:, 1:], begins[:, :-1], begins[:, 1:], isolate, filled[:, 1:])


def _heldout_span(split: Split, start: int, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, document beginnings, and which are tokens of the text, from `start`; each [T + 1]."""
    stop = min(start + row_tokens + 1, split.n_tokens)
    tokens = np.full(row_tokens + 1, split.eos_id, dtype=np.int64)
    begins, filled = np.zeros((2, row_tokens + 1), dtype=np.bool_)
    tokens[: stop - start] = split.read(start, stop)
    filled[: stop - start] = True
    starts = split.offsets[np.searchsorted(split.offsets, start) : np.searchsorted(split.offsets, stop)]
    begins[starts - start] = True
    if not filled.all():
        begins[stop - start] = True
    return tokens, begins, filled


def _batch(
    tokens_BT: np.ndarray,
    following_BT: np.ndarray,
    begins_BT: np.ndarray,
    following_begins_BT: np.ndarray,
    isolate: bool,
    has_target_BT: np.ndarray | None = None,
) -> Batch:
    """The batch of these tokens, each with the token that follows it; `begins` marks the first token of a document."""
    targets_BT = following_BT.copy()
    column_T = np.arange(tokens_BT.shape[1], dtype=np.int64)
    if isolate:
        targets_BT[following_begins_BT] = NO_TARGET
        # A document that goes on from an earlier row is a segment of its own here, from position 0.
        begins_BT = begins_BT.copy()
        begins_BT[:, 0] = True
        segments_BT = np.cumsum(begins_BT, axis=1, dtype=np.int64) - 1
        positions_BT = column_T - np.maximum.accumulate(np.where(begins_BT, column_T, 0), axis=1)
    else:
        segments_BT = np.zeros_like(targets_BT)
        positions_BT = np.broadcast_to(column_T, targets_BT.shape).copy()
    if has_target_BT is not None:
        targets_BT[~has_target_BT] = NO_TARGET
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens_BT)),
        targets=torch.from_numpy(targets_BT),
        positions=torch.from_numpy(positions_BT),
        segments=torch.from_numpy(segments_BT),
        n_targets=int((targets_BT != NO_TARGET).sum()),
    )
