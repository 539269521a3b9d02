"""The order of rows: for every turn a permutation that is a function of seed and turn, found place by place.

Nothing is materialised: the permutation is a Feistel network over the row numbers (Luby & Rackoff, 1988), with numbers past
the last row sent through it again until they fall among the rows (cycle walking; Black & Rogaway, 2002). So opening, and
going to any row, cost the same for ten rows and for ten thousand million.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

_ROUNDS = 6
_WINDOW_GROUPS = 64
GROUP_ROWS = 64
"""Rows of about one length that stay together in a `BucketedOrder`; a constant, so that no batch size changes the order."""


class Order(Protocol):
    """An endless order of n rows: turn after turn, each row once in each. Row r has the place t · n + r in turn t."""

    @property
    def n(self) -> int:
        """Rows in a turn."""
        ...

    @property
    def seed(self) -> int:
        """What the order is a function of, beside n."""
        ...

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """The places that come as these numbers, int64 → int64; numbers t · n … t · n + n − 1 give the places of turn t."""
        ...


@dataclass(frozen=True)
class ShuffledOrder:
    """Each turn a permutation of its own."""

    n: int
    """Rows in a turn."""
    seed: int

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """As `Order`'s."""
        turns, places = np.divmod(numbers, self.n)
        rows = np.empty_like(numbers)
        for turn in np.unique(turns):
            of_turn = turns == turn
            rows[of_turn] = permuted(places[of_turn], self.n, self.seed, int(turn))
        return np.asarray(turns * self.n + rows)


@dataclass(frozen=True)
class BucketedOrder:
    """Shuffled, then sorted by length within windows of 4096 rows, whose groups of 64 come in a random order.

    Neighbours are of about one length, so that batches of them need little padding, and every turn brings other neighbours.
    """

    n: int
    """Rows in a turn."""
    lengths: Callable[[np.ndarray], np.ndarray]
    """Tokens of these rows, any integers; asked for a window at a time, so that those of all are never held."""
    seed: int
    _windows: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """As `Order`'s."""
        size = _WINDOW_GROUPS * GROUP_ROWS
        turns, places = np.divmod(numbers, self.n)
        rows = np.empty_like(numbers)
        for index, (turn, place) in enumerate(zip(turns.tolist(), places.tolist(), strict=True)):
            rows[index] = self._window(turn, place // size)[place % size]
        return np.asarray(turns * self.n + rows)

    def _window(self, turn: int, number: int) -> np.ndarray:
        key = (turn, number)
        if key not in self._windows:
            size = _WINDOW_GROUPS * GROUP_ROWS
            places = np.arange(number * size, min((number + 1) * size, self.n))
            rows = permuted(places, self.n, self.seed, turn)
            rows = rows[np.argsort(self.lengths(rows), kind="stable")]
            n_groups = -(-len(rows) // GROUP_ROWS)
            groups = permuted(np.arange(n_groups), n_groups, ~self.seed % 2**64, turn * 2**32 + number)
            for old in [each for each in self._windows if each[0] != turn or abs(each[1] - number) > 1]:
                self._windows.pop(old, None)
            parts = [rows[group * GROUP_ROWS : (group + 1) * GROUP_ROWS] for group in groups.tolist()]
            self._windows[key] = made = np.concatenate(parts)
            return made
        return self._windows[key]


def permuted(places: np.ndarray, n: int, seed: int, turn: int) -> np.ndarray:
    """Where a permutation of `n` things, keyed by seed and turn, sends each of `places`; int64 [m] in [0, n).

    Six rounds, two more than a pseudo-random permutation is proved to need, since the halves are small.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    low = np.uint64(2**half - 1)
    shift = np.uint64(half)
    found = np.asarray(places).astype(np.uint64)
    outside = np.ones(len(found), dtype=np.bool_)
    while outside.any():
        left, right = found[outside] >> shift, found[outside] & low
        for key in _keys(seed, turn):
            left, right = right, left ^ (_mixed(right ^ key) & low)
        found[outside] = left << shift | right
        outside &= found >= n
    return found.astype(np.int64)


_ODD = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=64)
def _keys(seed: int, turn: int) -> tuple[np.uint64, ...]:
    """The keys of the rounds."""
    key = np.array([seed % 2**64], dtype=np.uint64)
    return tuple(_mixed(_mixed(key) ^ np.uint64(turn % 2**64) ^ np.arange(_ROUNDS, dtype=np.uint64) * _ODD))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea & Flood, OOPSLA 2014): uint64 [n] to well-mixed uint64 [n]."""
    mixed = numbers + _ODD  # an array's product wraps around silently, as it must here
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
