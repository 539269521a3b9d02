"""The order of rows: permutations that are keyed, frozen and found place by place; buckets of about one length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.data.order import GROUP_ROWS, BucketedOrder, ShuffledOrder, permuted


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**64), turn=st.integers(0, 2**40))
def test_it_is_a_permutation(n: int, seed: int, turn: int) -> None:
    assert sorted(permuted(np.arange(n), n, seed, turn).tolist()) == list(range(n))


def test_it_changes_with_seed_and_turn() -> None:
    orders = [permuted(np.arange(1000), 1000, seed, turn).tolist() for seed in (0, 1, 2**63) for turn in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_it_is_frozen() -> None:
    # Resuming a run under another NumPy, or on another machine, must find the same order.
    assert permuted(np.arange(8), 8, 7, 3).tolist() == [7, 2, 0, 1, 6, 5, 4, 3]


def test_every_permutation_of_four_comes_about_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(permuted(np.arange(4), 4, seed, 0).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    # 100 each are expected; six standard deviations are 59.
    assert min(counts.values()) >= 41
    assert max(counts.values()) <= 159


def test_neighbours_are_scattered() -> None:
    n = 100_000
    order = permuted(np.arange(n), n, 3, 0)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02
    assert (np.abs(np.diff(order)) < 10).mean() < 0.001


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 60), seed=st.integers(0, 2**64), first=st.integers(0, 10**12))
def test_any_place_is_found_alone(n: int, seed: int, first: int) -> None:
    order = ShuffledOrder(n, seed)
    numbers = np.arange(first, first + 2 * n)
    together = order.places(numbers).tolist()
    assert together == [int(order.places(np.array([number]))[0]) for number in numbers.tolist()]
    assert all(place // n == number // n for place, number in zip(together, numbers.tolist(), strict=True))


@pytest.mark.parametrize("n", [1, 63, 64, 5000, 9000])
def test_buckets_are_a_permutation_of_about_equal_neighbours(n: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 512, size=n)
    order = BucketedOrder(n, lengths.__getitem__, 5)
    for turn in (0, 1):
        places = order.places(np.arange(turn * n, turn * n + n))
        assert sorted(places.tolist()) == list(range(turn * n, turn * n + n))
    if n >= 4096:
        groups = lengths[order.places(np.arange(4096))].reshape(-1, GROUP_ROWS)
        padded = groups.max(axis=1).sum() * GROUP_ROWS
        assert groups.sum() / padded > 0.97
        assert order.places(np.arange(n)).tolist() != (order.places(np.arange(n, 2 * n)) - n).tolist()


def test_buckets_are_found_from_anywhere() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, size=9000)
    whole = BucketedOrder(9000, lengths.__getitem__, 5).places(np.arange(20_000))
    for first in (0, 4090, 8990, 9000, 17_000):
        assert (
            BucketedOrder(9000, lengths.__getitem__, 5).places(np.arange(first, first + 20)).tolist()
            == whole[first : first + 20].tolist()
        )


def test_buckets_look_only_at_the_lengths_of_their_window() -> None:
    asked: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return rows % 100

    order = BucketedOrder(10**9, lengths, 5)
    assert len(set(order.places(np.arange(10**8, 10**8 + 5000)).tolist())) == 5000
    assert asked == [4096] * len(asked)
    assert len(asked) <= 3
