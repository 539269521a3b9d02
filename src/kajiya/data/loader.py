"""Batches of rows in one global order, a function of the seed and the row's number alone; any is found at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.data.example_rows import ExampleKind, PackedRows, PaddedRows, PairRows
from kajiya.data.masking import MaskedRows, Masking
from kajiya.data.order import BucketedOrder, Order, ShuffledOrder
from kajiya.data.pack import open_packing
from kajiya.data.prefetch import AHEAD, ReadAhead
from kajiya.data.shards import Split, open_split
from kajiya.data.text_rows import HeldoutText, Rows, TextRows
from kajiya.errors import StoreError

_PLACES_AHEAD = 1024
Enrich = Callable[[Any], Any]
"""What is added to a batch, a function of the batch alone."""


@dataclass(frozen=True)
class Feed:
    """Which rows a model is fed with."""

    row_tokens: int
    """Tokens of a row, T."""
    isolate: bool = True
    """Documents of text that share a row do not see each other (examples never do)."""
    takes: str = "tokens"
    """What the loss takes: tokens, masked, preference, feedback, labelled or seq2seq."""
    packing: str = "concatenate"
    """concatenate, best_fit or bucketed (`kajiya.data.pack.choose_packing`)."""
    packed: Path | None = None
    """Folder of the packing artifact (`kajiya.data.pack.build_packing`); `None` for concatenated text."""
    is_causal: bool = True
    """Whether the model's tokens see only what stands before them; masked rows never are."""
    masking: Masking | None = None
    """Of masked rows."""
    start_id: int | None = None
    """Of pairs: the token that the decoder reads first."""


class Loader:
    """Batches of rows. The position is one number, and the row at a position depends on nothing else.

    With several ranks, each takes its part of every global group of `rows` · `world` rows, so that neither the number of
    ranks nor the size of the batch changes the order. `enrich` adds to each batch what its loss looks up; it is called where
    the rows are read, in the thread that reads ahead.
    """

    def __init__(
        self, rows: Rows, order: Order, *, batch: int, rank: int = 0, world: int = 1, enrich: Enrich | None = None
    ) -> None:
        self.rows = rows
        self.order = order
        self.batch = batch
        self.rank = rank
        self.world = world
        self.enrich = enrich
        self.row = 0
        """Rows given out since the beginning, by all ranks; the next group begins with this one."""
        # Places are looked up many at a time, which costs hardly more than one.
        self._known_places = (0, np.zeros(0, dtype=np.int64))
        self._read_ahead = ReadAhead(self._make)

    @property
    def rows_per_epoch(self) -> int:
        """Rows until everything has been given out."""
        return self.rows.n

    @property
    def epoch(self) -> int:
        """Passes over the data that are behind the next row."""
        return self.rows.epoch(self.row)

    def next(self) -> Any:
        """This rank's rows of the next group; while the model computes on them, those behind are made ready."""
        group = self.batch * self.world
        first = self.row + self.rank * self.batch
        batch = self._read_ahead.take([(first + number * group, self.batch) for number in range(AHEAD + 1)])
        self.row += group
        return batch

    @property
    def waited_s(self) -> float:
        """Time that `next` has waited for rows that were not ready, seconds."""
        return self._read_ahead.waited_s

    def at(self, row: int) -> Any:
        """The batch of rows from number `row` on; the position stays."""
        return self._make(row, self.batch)

    def heaviest(self) -> Any:
        """The batch that takes the most memory; the position stays."""
        return self._enriched(self.rows.heaviest(self.batch))

    def _make(self, row: int, n: int) -> Any:
        first, places = self._known_places
        if not first <= row <= row + n <= first + len(places):
            first, places = row, self.order.places(np.arange(row, row + max(n, _PLACES_AHEAD)))
            self._known_places = (first, places)
        return self._enriched(places[row - first : row - first + n])

    def _enriched(self, places: np.ndarray) -> Any:
        batch = self.rows.batch(places)
        return batch if self.enrich is None else self.enrich(batch)

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
        return {"seed": self.order.seed} | self.rows.identity()


def open_loader(
    shards: Path,
    split: str,
    feed: Feed,
    *,
    batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    enrich: Enrich | None = None,
) -> Loader:
    """A loader over a split of the shards in `shards`, at its beginning.

    With `isolate`, positions restart in every document and its last token has no target; without it, a row is one segment.
    """
    rows = _training_rows(open_split(shards, split), feed, seed)
    order: Order = ShuffledOrder(rows.n, seed)
    if isinstance(rows, (PaddedRows, PairRows)):
        order = BucketedOrder(rows.n, rows.lengths, seed)
    return Loader(rows, order, batch=batch, rank=rank, world=world, enrich=enrich)


def heldout_rows(shards: Path, feed: Feed, *, rows: int, batch: int = 8, seed: int = 0) -> Iterator[Any]:
    """Batches of the held-out split for evaluation: the same rows, in the same order, every time.

    At most `rows` rows, spread evenly over the split. Every token of a text is a target once, but for the first of a
    document (of the whole text, without `isolate`).
    """
    source = heldout_source(shards, feed, seed)
    n_chosen = min(rows, source.n)
    chosen = np.arange(n_chosen, dtype=np.int64) * source.n // n_chosen
    for first in range(0, n_chosen, batch):
        yield source.batch(chosen[first : first + batch])


def _training_rows(split: Split, feed: Feed, seed: int) -> Rows:
    if feed.packed is not None:
        return _masked(_example_rows(split, feed, feed.packed), feed, seed)
    return _masked(TextRows(split, feed.row_tokens, isolate=feed.isolate, seed=seed), feed, seed)


def heldout_source(shards: Path, feed: Feed, seed: int) -> Rows:
    """The rows of the held-out split, in its own order."""
    split = open_split(shards, "heldout")
    if feed.packed is not None:
        return _masked(_example_rows(split, feed, feed.packed), feed, seed)
    return _masked(HeldoutText(split, feed.row_tokens, isolate=feed.isolate), feed, seed)


def _masked(rows: Rows, feed: Feed, seed: int) -> Rows:
    return rows if feed.masking is None else MaskedRows(rows, feed.masking, seed)


def _example_rows(split: Split, feed: Feed, packed: Path) -> Rows:
    packing = open_packing(packed, split.name)
    if feed.takes == "seq2seq":
        assert feed.start_id is not None, "pairs need the decoder's start token"
        return PairRows(split, packing, feed.start_id)
    kind = ExampleKind(keeps_examples=feed.takes not in ("tokens", "masked"), is_causal=feed.is_causal)
    if feed.packing == "bucketed":
        return PaddedRows(split, packing, kind)
    return PackedRows(split, packing, feed.row_tokens, kind)
