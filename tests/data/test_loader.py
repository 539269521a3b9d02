"""The loader against a slow reference: naive concatenation, one token at a time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.documents import cumulated
from kajiya.data.loader import Feed, Loader, heldout_rows, open_loader
from kajiya.data.order import ShuffledOrder
from kajiya.data.shards import Split, open_split
from kajiya.data.text_rows import TextRows
from kajiya.errors import StoreError

Cell = tuple[int, int, int, int]
"""Token, target, position, segment."""


def split_of(lengths: list[int], shard_tokens: int) -> Split:
    """Documents of these lengths whose tokens are all different: 0, 1, 2 …"""
    offsets = cumulated(lengths)
    tokens = np.arange(offsets[-1], dtype="<u4")
    files = tuple(tokens[start : start + shard_tokens] for start in range(0, len(tokens), shard_tokens))
    return Split(Path(), "train", files, offsets, np.array(lengths), bos_id=0, eos_id=1, pad_id=2)


def loader_of(split: Split, *, row_tokens: int, rows: int, seed: int, isolate: bool = True, **ranks: int) -> Loader:
    text = TextRows(split, row_tokens, isolate=isolate, seed=seed)
    return Loader(text, ShuffledOrder(text.n, seed), batch=rows, **ranks)


def place(loader: Loader, row: int) -> int:
    (found,) = loader.order.places(np.array([row])).tolist()
    return int(found)


def documents_of(split: Split, seed: int, epoch: int) -> list[int]:
    """The documents in the order of an epoch: those from a first one on, then those before it."""
    first = TextRows(split, 1, isolate=True, seed=seed).first_document(epoch)
    return [*range(first, split.n_documents), *range(first)]


def stream(split: Split, seed: int, epochs: int) -> list[tuple[int, bool]]:
    """All tokens of the first epochs, one by one, with whether each begins a document."""
    cells = []
    for epoch in range(epochs):
        for document in documents_of(split, seed, epoch):
            start, stop = split.offsets[document], split.offsets[document + 1]
            cells += [(token, token == start) for token in range(start, stop)]
    return cells


def slow_rows(cells: list[tuple[int, bool]], row_tokens: int, isolate: bool) -> list[list[Cell]]:
    """Rows cut from the stream, by the rules as they are written down."""
    rows = []
    for row in range((len(cells) - 1) // row_tokens):
        position, segment = -1, 0
        made = []
        for column in range(row_tokens):
            token, is_first = cells[row * row_tokens + column]
            following, following_is_first = cells[row * row_tokens + column + 1]
            if isolate and is_first and column:
                position, segment = -1, segment + 1
            position += 1
            made.append((token, NO_TARGET if isolate and following_is_first else following, position, segment))
        rows.append(made)
    return rows


def rows_of(batch: Batch) -> list[list[Cell]]:
    cells = torch.stack([batch.tokens, batch.targets, batch.positions, batch.segments], dim=-1)
    return [[tuple(cell) for cell in row] for row in cells.tolist()]


lengths = st.lists(st.integers(2, 30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    lengths=lengths,
    row_tokens=st.integers(1, 40),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**64),
    shard_tokens=st.integers(1, 50),
    isolate=st.booleans(),
)
def test_rows_are_those_of_the_slow_reference(
    lengths: list[int], row_tokens: int, rows: int, seed: int, shard_tokens: int, isolate: bool
) -> None:
    split = split_of(lengths, shard_tokens)
    n_batches = 4
    loader = loader_of(split, row_tokens=row_tokens, rows=rows, seed=seed, isolate=isolate)
    places = [place(loader, row) for row in range(n_batches * rows)]
    epochs = (max(places) + 1) * row_tokens // split.n_tokens + 2
    expected = slow_rows(stream(split, seed, epochs), row_tokens, isolate)
    found = []
    for _ in range(n_batches):
        batch = loader.next()
        assert batch.n_targets == int((batch.targets != NO_TARGET).sum())
        found += rows_of(batch)
    assert found == [expected[place] for place in places]


def in_place(loader: Loader, turns: int, what: Callable[[Batch], torch.Tensor]) -> list[int]:
    """Tokens (or targets) of so many turns of rows, in the order of the stream."""
    places = loader.order.places(np.arange(turns * loader.rows_per_epoch))
    rows = what(loader.rows.batch(places)).tolist()
    return [cell for _, row in sorted(zip(places.tolist(), rows, strict=True)) for cell in row]


@settings(deadline=None, max_examples=30)
@given(lengths=lengths, row_tokens=st.integers(1, 9), seed=st.integers(0, 2**64))
def test_the_rows_of_a_turn_are_a_permutation_of_its_places(lengths: list[int], row_tokens: int, seed: int) -> None:
    loader = loader_of(split_of(lengths, 17), row_tokens=row_tokens, rows=1, seed=seed, isolate=True)
    n = loader.rows_per_epoch
    for turn in (0, 1, 2, 0):
        places = loader.order.places(np.arange(turn * n, turn * n + n))
        assert sorted(places.tolist()) == list(range(turn * n, turn * n + n))


def test_a_batch_holds_rows_of_many_documents() -> None:
    loader = loader_of(split_of([400] * 50, 10**6), row_tokens=20, rows=16, seed=0, isolate=True)
    documents = {token // 400 for token in loader.next().tokens.flatten().tolist()}
    assert len(documents) >= 10


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, row_tokens=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_each_token_comes_once_in_each_epoch(lengths: list[int], row_tokens: int, seed: int) -> None:
    split = split_of(lengths, 17)
    loader = loader_of(split, row_tokens=row_tokens, rows=1, seed=seed, isolate=True)
    n_epochs = 3
    tokens = in_place(loader, n_epochs, lambda batch: batch.tokens)
    for epoch in range(n_epochs):
        of_epoch = tokens[epoch * split.n_tokens : (epoch + 1) * split.n_tokens]
        assert sorted(of_epoch) == list(range(split.n_tokens))


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, row_tokens=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_each_token_but_the_first_of_a_document_is_a_target_once(
    lengths: list[int], row_tokens: int, seed: int
) -> None:
    split = split_of(lengths[:5], 1000)
    # As many turns as there are tokens make a whole number of epochs: one for each row of a turn, and T of them.
    loader = loader_of(split, row_tokens=row_tokens, rows=1, seed=seed, isolate=True)
    n_epochs = loader.rows_per_epoch * row_tokens
    found = in_place(loader, split.n_tokens, lambda batch: batch.targets)
    targets = torch.tensor(found)
    counts = torch.bincount(targets[targets != NO_TARGET], minlength=split.n_tokens).tolist()
    firsts = set(split.offsets[:-1].tolist())
    assert counts == [0 if token in firsts else n_epochs for token in range(split.n_tokens)]


@settings(deadline=None, max_examples=40)
@given(lengths=lengths, row_tokens=st.integers(1, 20), cut=st.integers(0, 12), seed=st.integers(0, 2**32))
def test_resumed_is_uninterrupted(lengths: list[int], row_tokens: int, cut: int, seed: int) -> None:
    split = split_of(lengths, 9)

    def opened() -> Loader:
        return loader_of(split, row_tokens=row_tokens, rows=2, seed=seed, isolate=True)

    whole = opened()
    expected = [rows_of(whole.next()) for _ in range(16)]
    before = opened()
    for _ in range(cut):
        before.next()
    after = opened()
    after.load_state(before.state())
    assert [rows_of(after.next()) for _ in range(16 - cut)] == expected[cut:]


def test_ranks_share_each_group_and_change_no_row() -> None:
    split = split_of([5, 9, 2, 14, 3, 3], 8)
    alone = loader_of(split, row_tokens=7, rows=6, seed=4)
    groups = [rows_of(alone.next()) for _ in range(4)]
    for world in (2, 3, 6):
        ranks = [loader_of(split, row_tokens=7, rows=6 // world, seed=4, rank=r, world=world) for r in range(world)]
        assert [[row for rank in ranks for row in rows_of(rank.next())] for _ in range(4)] == groups
        assert all(rank.state() == alone.state() for rank in ranks)


def test_rows_do_not_depend_on_the_batch_size() -> None:
    split = split_of([5, 9, 2, 14, 3, 3], 8)
    by_size = []
    for rows in (1, 2, 3, 6):
        loader = loader_of(split, row_tokens=7, rows=rows, seed=4)
        by_size.append([row for _ in range(18 // rows) for row in rows_of(loader.next())])
    assert by_size[0] == by_size[1] == by_size[2] == by_size[3]


def test_a_distant_row_is_found_without_reading_what_is_before() -> None:
    split = split_of([11, 13, 17], 10)
    loader = loader_of(split, row_tokens=5, rows=1, seed=0, isolate=False)
    turn = 41 * 10**9
    row = next(row for row in range(turn * 9, turn * 9 + 9) if place(loader, row) == turn * 9)
    batch = loader.at(row)
    epoch = turn * 9 * 5 // split.n_tokens
    first = [
        token for doc in documents_of(split, 0, epoch) for token in range(split.offsets[doc], split.offsets[doc + 1])
    ]
    skipped = turn * 9 * 5 % split.n_tokens
    assert loader.rows_per_epoch == 9
    assert batch.tokens[0].tolist() == first[skipped : skipped + 5]
    assert loader.row == 0


def test_positions_and_epochs_are_counted() -> None:
    split = split_of([10, 10, 5], 100)
    loader = loader_of(split, row_tokens=4, rows=2, seed=0, isolate=True)
    assert loader.rows_per_epoch == 7
    for _ in range(4):
        loader.next()
    assert loader.state() == {"row": 8, "epoch": 1, "seed": 0, "row_tokens": 4, "n_documents": 3, "n_tokens": 25}


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("row_tokens", 8), ("n_tokens", 24), ("n_documents", 2)])
def test_a_state_of_another_stream_is_refused(name: str, value: int) -> None:
    loader = loader_of(split_of([10, 10, 5], 100), row_tokens=4, rows=2, seed=0, isolate=True)
    with pytest.raises(StoreError, match=f"saved at {name}={value}, and here it is {name}="):
        loader.load_state(loader.state() | {name: value})


def test_a_state_that_is_none_is_refused() -> None:
    loader = loader_of(split_of([10], 100), row_tokens=4, rows=2, seed=0, isolate=True)
    with pytest.raises(StoreError, match=r"lacks n_documents, n_tokens, row_tokens, seed"):
        loader.load_state({"row": 3})


# ---------------------------------------------------------------- on real shards


def test_rows_of_real_shards_are_the_documents(small) -> None:
    split = open_split(small.shards.path, "train")
    loader = open_loader(small.shards.path, "train", Feed(64), batch=8, seed=5)
    assert len(split.files) > 3
    naive = np.concatenate([split.document(doc) for doc in documents_of(split, 5, 0)]).astype(np.int64)
    read: dict[int, list[int]] = {}
    while len(read) < loader.rows_per_epoch:
        first = loader.row
        batch = loader.next()
        read |= {place(loader, first + index): row for index, row in enumerate(batch.tokens.tolist())}
        # A segment holds one document: begin-of-text stands only at its beginning, end-of-text only at its end.
        assert bool((batch.positions[batch.tokens == split.bos_id] == 0).all())
        assert bool((batch.targets[batch.tokens == split.eos_id] == NO_TARGET).all())
        assert not bool((batch.targets == split.bos_id).any())
    tokens = [token for place in sorted(read) for token in read[place]]
    assert tokens[: len(naive)] == naive.tolist()


def test_heldout_rows_cover_the_heldout_text(small) -> None:
    split = open_split(small.shards.path, "heldout")
    batches = list(heldout_rows(small.shards.path, Feed(64), rows=10**6, batch=7))
    assert all(batch.tokens.shape[1] == 64 for batch in batches)
    tokens = torch.cat([batch.tokens for batch in batches]).flatten()
    everything = split.read(0, split.n_tokens).astype(np.int64)
    filled = min(len(tokens), len(everything))
    assert tokens[:filled].tolist() == everything[:filled].tolist()
    assert len(everything) - filled <= 1
    # Every token is a target once, but for the first of each document.
    assert sum(batch.n_targets for batch in batches) == split.n_tokens - split.n_documents
    targets = torch.cat([batch.targets for batch in batches]).flatten()
    assert targets[targets != NO_TARGET].tolist() == [
        token for doc in range(split.n_documents) for token in split.document(doc)[1:].tolist()
    ]


def test_heldout_rows_are_few_spread_and_always_the_same(small) -> None:
    def chosen() -> list[list[int]]:
        batches = heldout_rows(small.shards.path, Feed(64), rows=10, batch=4)
        return torch.cat([batch.tokens for batch in batches]).tolist()

    split = open_split(small.shards.path, "heldout")
    rows = chosen()
    assert len(rows) == 10
    assert rows == chosen()
    everything = split.read(0, split.n_tokens).astype(np.int64)
    n_rows = -(-(split.n_tokens - 1) // 64)
    assert rows == [everything[64 * (i * n_rows // 10) :][:64].tolist() for i in range(10)]


def test_heldout_text_shorter_than_a_row_makes_one_row(small) -> None:
    split = open_split(small.shards.path, "heldout")
    for isolate in (True, False):
        (batch,) = heldout_rows(small.shards.path, Feed(2 * split.n_tokens, isolate), rows=4)
        assert batch.tokens.shape == (1, 2 * split.n_tokens)
        assert batch.n_targets == split.n_tokens - (split.n_documents if isolate else 1)
        assert bool((batch.targets[0, split.n_tokens - 1 :] == NO_TARGET).all())
        assert bool((batch.tokens[0, split.n_tokens :] == split.eos_id).all())
