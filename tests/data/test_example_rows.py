"""Rows of whole examples: every token where it belongs, targets and weights shifted within a sequence, none across two."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.example_splits import PAD, example_split
from tests.data.test_loader import split_of

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch
from kajiya.data.example_rows import ExampleKind, PackedRows, PaddedRows, PairRows
from kajiya.data.loader import Loader
from kajiya.data.masking import MaskedRows, Masking
from kajiya.data.order import BucketedOrder, ShuffledOrder
from kajiya.data.pack import Packing, best_fit
from kajiya.data.text_rows import TextRows

TOKENS = ExampleKind(keeps_examples=False)
EXAMPLES = ExampleKind(keeps_examples=True)


def packing_of(lengths: list[list[int]], room: int) -> Packing:
    array = np.array(lengths)
    starts = np.concatenate([[0], np.cumsum(array.flatten())[:-1]]).reshape(array.shape)
    order, rows = best_fit(array.sum(axis=1), room)
    return Packing(order, rows, array[order], starts[order])


def check_rows(batch: Batch, owner: torch.Tensor | None, weights: np.ndarray, lengths: list[int]) -> list[int]:
    """Every rule of a batch, read off token by token; returns the sequences in the order they came."""
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    seen: list[int] = []
    for row in range(batch.tokens.shape[0]):
        segments: dict[int, list[int]] = {}
        for column, segment in enumerate(batch.segments[row].tolist()):
            segments.setdefault(segment, []).append(column)
        assert list(segments) == list(range(len(segments)))
        for columns in segments.values():
            assert columns == list(range(columns[0], columns[-1] + 1))
            assert batch.positions[row, columns].tolist() == list(range(len(columns)))
            tokens, targets = batch.tokens[row, columns].tolist(), batch.targets[row, columns].tolist()
            if PAD in tokens:
                assert set(tokens) == {PAD}
                assert set(targets) == {NO_TARGET}
                assert owner is None or set(owner[row, columns].tolist()) == {-1}
                continue
            sequence = int(np.searchsorted(firsts, tokens[0], side="right")) - 1
            assert tokens == list(range(firsts[sequence], firsts[sequence + 1])), "a sequence stays whole and in order"
            expected = [token + 1 if weights[token + 1] else NO_TARGET for token in tokens[:-1]]
            assert targets == [*expected, NO_TARGET]
            if batch.weights is not None:
                kept = [batch.weights[row, c].item() for c, t in zip(columns, targets, strict=True) if t != NO_TARGET]
                assert kept == pytest.approx([weights[t] for t in targets if t != NO_TARGET])
            if owner is not None:
                assert len(set(owner[row, columns].tolist())) == 1
            seen.append(sequence)
    assert batch.n_targets == int((batch.targets != NO_TARGET).sum())
    return seen


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 2), st.sampled_from([(0.0, 1.0), (0.0, 0.5, 2.0)]), st.booleans())
def test_rows_hold_every_example_once_and_whole(
    data: st.DataObject, k: int, table: tuple[float, ...], padded: bool
) -> None:
    n = data.draw(st.integers(1, 12))
    lengths = [[data.draw(st.integers(2, 9)) for _ in range(k)] for _ in range(n)]
    flat = [each for example in lengths for each in example]
    weights = np.array([data.draw(st.sampled_from(table)) for _ in range(sum(flat))])
    split = example_split(lengths, weights.tolist())
    packing = packing_of(lengths, 20)
    source = PaddedRows(split, packing, TOKENS) if padded else PackedRows(split, packing, 20, TOKENS)
    loader = Loader(source, ShuffledOrder(source.n, 3), batch=2)
    seen: list[int] = []
    while len(seen) < 2 * len(flat):
        first = loader.row
        batch = (
            loader.at(first) if loader.row + 2 <= 2 * source.n else source.batch(loader.order.places(np.array([first])))
        )
        loader.row += 2
        assert (batch.weights is not None) == split.weighs
        seen += check_rows(batch, None, weights, flat)
    assert sorted(seen) == sorted(2 * list(range(len(flat))))


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_of_pairs_says_which_sequence_is_whose(padded: bool) -> None:
    lengths = [[3, 5], [4, 2], [6, 6], [2, 2], [7, 3]]
    split = example_split(lengths, [1.0] * 40)
    packing = packing_of(lengths, 20)
    source: Any = PaddedRows(split, packing, EXAMPLES) if padded else PackedRows(split, packing, 20, EXAMPLES)
    batch = source.batch(np.arange(source.n))
    assert isinstance(batch, ExampleBatch)
    assert sorted(batch.examples.tolist()) == [0, 1, 2, 3, 4]
    assert batch.counts["examples"] == 5
    flat_tokens, flat_owner = batch.rows.tokens.flatten(), batch.owner.flatten()
    firsts = np.concatenate([[0], np.cumsum(np.array(lengths).flatten())])
    for place, example in enumerate(batch.examples.tolist()):
        for j in range(2):
            number = example * 2 + j
            expected = list(range(firsts[number], firsts[number + 1]))
            assert flat_tokens[flat_owner == place * 2 + j].tolist() == expected
            assert flat_tokens[batch.last[place * 2 + j]].item() == expected[-1]
    check_rows(batch.rows, batch.owner, np.ones(40), np.array(lengths).flatten().tolist())
    if padded:
        assert batch.rows.tokens.shape == (10, 8)


@pytest.mark.parametrize(("labels", "dtype"), [([1, 0, 2], torch.int64), ([0.5, 1.0, 2.5], torch.float32)])
def test_labels_go_with_their_examples(labels: list[float], dtype: torch.dtype) -> None:
    lengths = [[3], [4], [5]]
    split = example_split(lengths, [0.0] * 12, labels)
    batch = PackedRows(split, packing_of(lengths, 12), 12, EXAMPLES).batch(np.array([0]))
    assert isinstance(batch, ExampleBatch)
    assert batch.labels is not None
    assert batch.labels.dtype == dtype
    assert batch.labels.tolist() == [labels[example] for example in batch.examples.tolist()]


def test_pairs_of_an_encoder_and_a_decoder() -> None:
    lengths = [[3, 5], [9, 2], [1, 10], [4, 4]]
    split = example_split(lengths, [1.0] * 38)
    rows = PairRows(split, packing_of(lengths, 20), start_id=77)
    firsts = np.concatenate([[0], np.cumsum(np.array(lengths).flatten())])
    batch = rows.batch(np.arange(4))
    assert batch.inputs.shape == batch.tokens.shape == (4, 16)
    for row, example in enumerate(rows.packing.examples.tolist()):
        n, m = lengths[example]
        assert batch.inputs[row, :n].tolist() == list(range(firsts[2 * example], firsts[2 * example] + n))
        assert batch.inputs_mask[row].tolist() == [True] * n + [False] * (16 - n)
        said = list(range(firsts[2 * example + 1], firsts[2 * example + 1] + m))
        assert batch.targets[row].tolist() == said + [NO_TARGET] * (16 - m)
        assert batch.tokens[row, :m].tolist() == [77, *said[:-1]]
    assert batch.n_targets == 21
    assert batch.examples is not None
    assert batch.examples.tolist() == rows.packing.examples.tolist()


def test_buckets_keep_padding_small_and_resume_exactly() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(4.5, 0.75, size=2000).astype(int).clip(2, 512)[:, None].tolist()
    split = example_split(lengths, file_tokens=10**6)
    rows = PaddedRows(split, packing_of(lengths, 512), TOKENS)
    whole = Loader(rows, BucketedOrder(rows.n, rows.lengths, 1), batch=8)
    batches = [whole.next() for _ in range(250)]
    used = sum(int((batch.tokens != PAD).sum()) for batch in batches)
    assert used == sum(n for (n,) in lengths)
    assert used / sum(batch.tokens.numel() for batch in batches) > 0.93
    later = Loader(rows, BucketedOrder(rows.n, rows.lengths, 1), batch=8)
    later.load_state({**whole.state(), "row": 8 * 100})
    assert torch.equal(later.next().tokens, batches[100].tokens)


@pytest.mark.parametrize("kind", ["padded", "pairs"])
def test_all_lengths_are_gone_through_once_and_not_at_every_state(kind: str) -> None:
    nothing: Any = None
    lengths = Counted(np.array([[3, 4], [5, 6], [7, 8]]))
    packing = Packing(np.arange(3), np.arange(4), lengths, np.zeros((3, 2), dtype=np.int64))  # type: ignore[arg-type]
    rows = PaddedRows(nothing, packing, TOKENS) if kind == "padded" else PairRows(nothing, packing, 0)
    loader = Loader(rows, BucketedOrder(rows.n, rows.lengths, 1), batch=1)
    for _ in range(5):
        loader.load_state(loader.state())
        assert rows.lengths(np.arange(3)).tolist() == {"padded": [4, 6, 8], "pairs": [7, 11, 15]}[kind]
    assert rows.identity()["n_tokens"] == 33
    assert lengths.n_looked == 1


class Counted:
    """An array that counts how often all of it is gone through; a few at a time may be looked up."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.n_looked = 0

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[places])

    def sum(self, **axis: int) -> Any:
        self.n_looked += 1
        return self.array.sum(**axis)

    def max(self, **axis: int) -> Any:
        self.n_looked += 1
        return self.array.max(**axis)


# ---------------------------------------------------------------- masked rows

MASKING = Masking(mask_id=5_000, vocab_size=4_000, special_ids=(0, 1, 5_000))


def test_masked_rows_are_as_bert_has_them() -> None:
    split = split_of([300] * 13, 1000)
    text = TextRows(split, 64, isolate=True, seed=2)
    masked = MaskedRows(text, MASKING, seed=2)
    places = np.arange(4000) % 60 + 1_000_000
    kept = random = hidden = total = 0
    for first in range(0, 60, 20):
        whole, batch = text.batch(places[first : first + 20]), masked.batch(places[first : first + 20])
        assert not batch.is_causal
        chosen = batch.targets != NO_TARGET
        assert torch.equal(batch.targets[chosen], whole.tokens[chosen])
        assert torch.equal(batch.tokens[~chosen], whole.tokens[~chosen])
        assert not bool(chosen[(whole.tokens == 0) | (whole.tokens == 1)].any())
        assert bool(chosen.any(dim=1).all())
        assert batch.n_targets == int(chosen.sum())
        hidden += int((batch.tokens[chosen] == 5_000).sum())
        kept += int((batch.tokens[chosen] == whole.tokens[chosen]).sum())
        total += int(chosen.sum())
        random += int(((batch.tokens != whole.tokens) & (batch.tokens != 5_000) & chosen).sum())
        assert bool((batch.tokens[chosen & (batch.tokens != 5_000)] < 4_000).all())
    assert total == pytest.approx(0.15 * 60 * 64, abs=110)
    assert (hidden / total, random / total, kept / total) == pytest.approx((0.8, 0.1, 0.1), abs=0.06)


def test_which_tokens_are_hidden_is_a_function_of_seed_and_row_alone() -> None:
    split = split_of([300] * 13, 1000)

    def tokens(seed: int, places: list[int]) -> list[list[int]]:
        return (
            MaskedRows(TextRows(split, 64, isolate=True, seed=0), MASKING, seed).batch(np.array(places)).tokens.tolist()
        )

    together = tokens(1, [5, 6, 7])
    assert together == tokens(1, [5]) + tokens(1, [6]) + tokens(1, [7])
    assert together != tokens(2, [5, 6, 7])


def test_the_heaviest_rows_hold_the_longest_sequences_and_the_most_examples() -> None:
    """Of 7 examples in 4 rows; of pairs, the longest input and the longest target, to which a batch is padded."""
    lengths = np.array([[3], [9], [2], [2], [2], [2], [8]])
    packing = Packing(np.arange(7), np.array([0, 1, 2, 6, 7]), lengths, np.cumsum(lengths, axis=0) - lengths)
    nothing: Any = None
    packed = PackedRows(nothing, packing, 16, EXAMPLES)
    assert packed.heaviest(2).tolist() == [1, 2]
    assert sorted(packed.heaviest(4).tolist()) == [0, 1, 2, 3]
    assert len(packed.heaviest(9)) == 9
    assert PaddedRows(nothing, packing, EXAMPLES).heaviest(2).tolist() == [1, 6]
    two = np.array([[9, 1], [5, 6], [1, 8], [6, 6]])
    pairs = PairRows(nothing, Packing(np.arange(4), np.arange(5), two, np.zeros_like(two)), 0)
    assert pairs.heaviest(3).tolist() == [0, 2, 3]
