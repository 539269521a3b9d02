"""Resamples of whole groups of rows, a portion of the resamples at a time, so that memory is that of the rows themselves.

Shape letters: n rows, g groups (sources), k statistics of a row, R resamples.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np

from kajiya.errors import DataError

_PORTION = 1 << 20
"""Numbers that the resamples of a portion have together."""
_EXACT_GROUPS = 12
"""Up to this many groups every assignment of a permutation test is tried: 4096."""
_JACKKNIFE_BLOCKS = 200
"""A figure that needs all rows anew leaves out a block of groups at a time: its time would grow with the square of the rows."""

Parts = Sequence[np.ndarray] | np.ndarray
"""Row numbers of each group; int64 [g, 1] where each row stands alone."""
Figure = Callable[[np.ndarray], float]


def by_group(n_rows: int, groups: Sequence[str] | None) -> Parts:
    """Row numbers of each group, in order of first appearance. Raises `DataError` for no rows."""
    if n_rows == 0:
        raise DataError("There are no rows to compute a figure from.")
    if groups is None:
        return np.arange(n_rows)[:, None]
    if len(groups) != n_rows:
        raise ValueError(f"{len(groups)} groups for {n_rows} rows")
    found: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(group, []).append(row)
    if len(found) == n_rows:
        return np.arange(n_rows)[:, None]
    return [np.array(rows) for rows in found.values()]


def group_sums(rows: np.ndarray, parts: Parts) -> np.ndarray:
    """Sums of each group's rows, float64 [g, k]."""
    if isinstance(parts, np.ndarray):
        return rows
    return np.stack([rows[part].sum(axis=0) for part in parts])


def _rows_of(parts: Parts, chosen: np.ndarray) -> np.ndarray:
    """Row numbers of the chosen groups."""
    return parts[chosen, 0] if isinstance(parts, np.ndarray) else np.concatenate([parts[i] for i in chosen])


def portions(resamples: int, n: int) -> Iterator[int]:
    """How many resamples of `n` numbers each are drawn together, until there are `resamples`."""
    most = max(1, _PORTION // max(1, n))
    for first in range(0, resamples, most):
        yield min(most, resamples - first)


def drawn_ratios(numerators: np.ndarray, denominators: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Σ numerators / Σ denominators, both float [n], of resampled pairs, float [R]."""
    random, n = np.random.default_rng(seed), len(numerators)
    found = []
    for count in portions(resamples, n):
        draws = random.integers(0, n, size=(count, n))
        found.append(numerators[draws].sum(axis=1) / denominators[draws].sum(axis=1))
    return np.concatenate(found)


def drawn_figures(rows: np.ndarray, figure: Figure, parts: Parts, resamples: int, seed: int) -> np.ndarray:
    """A figure of the sums of the rows under every resample of the groups, float [R]."""
    random, n = np.random.default_rng(seed), len(parts)
    sums = group_sums(rows, parts)
    shares = np.full(n, 1 / n)
    found = []
    for count in portions(resamples, n):
        found += [figure(each) for each in random.multinomial(n, shares, size=count) @ sums]
    return np.array(found)


def drawn_by_rows(rows: np.ndarray, figure: Figure, parts: Parts, resamples: int, seed: int) -> np.ndarray:
    """A figure of the rows themselves under every resample of the groups, float [R]."""
    random, n = np.random.default_rng(seed), len(parts)
    return np.array(
        [
            figure(rows[_rows_of(parts, draw)])
            for count in portions(resamples, n)
            for draw in random.integers(0, n, size=(count, n))
        ]
    )


# ---------------------------------------------------------------- pairs


def swaps(n_groups: int, resamples: int, seed: int) -> tuple[Iterator[np.ndarray], bool]:
    """Which groups' answers change places, bool [some, g] a portion, and whether these are all ways that there are."""
    if n_groups <= _EXACT_GROUPS:
        return iter([np.array(list(product((False, True), repeat=n_groups)))]), True
    random = np.random.default_rng(seed)
    return (random.random((count, n_groups)) < 0.5 for count in portions(resamples, n_groups)), False


def swapped_figures(
    first: np.ndarray, second: np.ndarray, figure: Figure, parts: Parts, exchanges: Iterator[np.ndarray]
) -> np.ndarray:
    """Difference of the figures of sums after each exchange of the groups' answers, float [R]."""
    a, b = group_sums(first, parts), group_sums(second, parts)
    whole_a, whole_b, apart = a.sum(axis=0), b.sum(axis=0), a - b
    return np.array(
        [
            figure(whole_b + moved) - figure(whole_a - moved)
            for portion in exchanges
            for moved in portion.astype(np.float64) @ apart
        ]
    )


def swapped_by_rows(
    first: np.ndarray, second: np.ndarray, figure: Figure, parts: Parts, exchanges: Iterator[np.ndarray]
) -> np.ndarray:
    """The same of a figure of the rows themselves."""
    owner = np.empty(len(first), dtype=np.int64)
    for number, part in enumerate(parts):
        owner[part] = number
    masks = (swap[owner][:, None] for portion in exchanges for swap in portion)
    return np.array([figure(np.where(mask, first, second)) - figure(np.where(mask, second, first)) for mask in masks])


def left_out(rows: np.ndarray, figure: Figure, parts: Parts) -> np.ndarray:
    """The figure of sums without each group, float [g]."""
    return np.array([figure(each) for each in rows.sum(axis=0) - group_sums(rows, parts)])


def left_out_by_rows(rows: np.ndarray, figure: Figure, parts: Parts) -> np.ndarray:
    """The figure of the rows themselves without each of at most 200 blocks of groups, drawn by lot, float [blocks]."""
    n = len(parts)
    order = np.random.default_rng(0).permutation(n) if n > _JACKKNIFE_BLOCKS else np.arange(n)
    blocks = np.array_split(order, min(n, _JACKKNIFE_BLOCKS))
    return np.array([figure(np.delete(rows, _rows_of(parts, block), axis=0)) for block in blocks])
