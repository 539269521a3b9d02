"""How sure a figure is: intervals and paired tests by resampling whole sources, since rows of one source are not independent.

Shape letters: n rows, g groups (sources), k statistics of a row, R resamples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist

import numpy as np

from kajiya.errors import DataError

_RESAMPLES = 2000
_RESAMPLES_BY_ROWS = 500
"""A figure that needs all rows anew (ranks) is recomputed less often."""
_EXACT_GROUPS = 12
"""Up to this many groups every assignment of a permutation test is tried: 4096."""


@dataclass(frozen=True)
class Scores:
    """Per-row statistics of one metric, and how they become its figure."""

    rows: np.ndarray
    """float64 [n, k]."""
    figure: Callable[[np.ndarray], float]
    """Of the sums of the rows [k], or, where `by_rows`, of the rows themselves [n, k]."""
    by_rows: bool = False
    is_lower_better: bool = False
    points: float | None = None
    """Points in 1 of the figure: 100 of a share from 0 to 1, 1 of a score up to 100; `None` of what is no such score."""

    @property
    def is_mean(self) -> bool:
        """Whether the figure is Σ first statistic / Σ second."""
        return self.figure is _ratio

    def value(self) -> float:
        """The figure over all rows."""
        return self.figure(self.rows if self.by_rows else self.rows.sum(axis=0))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: figure of the second less that of the first, and what can be said of it."""

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    """95 % bootstrap interval of the difference."""
    p_value: float
    test: str
    """permutation, exact permutation or exact McNemar."""
    effect_size: float
    """Mean over standard deviation of the groups' (pseudo-)differences, Cohen's d_z."""
    n_rows: int
    n_groups: int
    n_needed: int | None
    """Groups with which a difference of this size would be shown with 80 % power; `None` for no difference at all."""
    is_lower_better: bool


def mean_scores(
    values: Sequence[float] | np.ndarray, is_lower_better: bool = False, points: float | None = None
) -> Scores:
    """The mean of one value a row."""
    column = np.asarray(values, dtype=np.float64)
    return ratio_scores(column, np.ones_like(column), is_lower_better, points)


def ratio_scores(
    numerators: np.ndarray, denominators: np.ndarray, is_lower_better: bool = False, points: float | None = None
) -> Scores:
    """Σ numerators / Σ denominators, both [n]."""
    rows = np.stack([numerators, denominators], axis=1).astype(np.float64)
    return Scores(rows, _ratio, is_lower_better=is_lower_better, points=points)


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


# ---------------------------------------------------------------- intervals


def interval(
    scores: Scores,
    groups: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = _RESAMPLES_BY_ROWS,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the figure (Efron, 1979), drawing whole groups with replacement (Cameron et al., 2008).

    `groups` names the source of each row; `None`: each row is its own. Where every row is right, or none, resampling cannot
    vary: the interval is then Wilson's (1927) over the groups. `None` where nothing can be said: from a single group, and of
    any other figure that is alike in every resample. `resamples` are those of a figure `by_rows`. Raises `DataError` for no rows.
    """
    parts = _by_group(len(scores.rows), groups)
    if len(parts) < 2:
        return None
    if scores.points == 100 and _is_right_or_wrong(scores) and np.ptp(scores.rows[:, 0]) == 0:
        return wilson(float(scores.rows[0, 0]), len(parts), level)
    low, high = _quantiles(_drawn(scores, parts, seed, resamples), level)
    return (low, high) if high - low > 1e-12 * max(1.0, abs(low)) else None  # rounding is no width


def wilson(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share of n independent trials (Wilson, 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, level: float = 0.95, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of Σ numerators / Σ denominators, both float [n], resampling the n pairs (Efron, 1979)."""
    if len(numerators) == 0:
        raise ValueError("an interval needs at least one document")
    draws = np.random.default_rng(seed).integers(0, len(numerators), size=(resamples, len(numerators)))
    ratios = numerators[draws].sum(axis=1) / denominators[draws].sum(axis=1)
    return _quantiles(ratios, level)


def _drawn(scores: Scores, parts: list[np.ndarray], seed: int, resamples: int = _RESAMPLES_BY_ROWS) -> np.ndarray:
    """The figure of every resample, float [R]; of one `by_rows`, R is `resamples`."""
    random = np.random.default_rng(seed)
    if scores.by_rows:
        draws = random.integers(0, len(parts), size=(resamples, len(parts)))
        return np.array([scores.figure(scores.rows[np.concatenate([parts[i] for i in draw])]) for draw in draws])
    sums = _group_sums(scores.rows, parts)
    counts = random.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=_RESAMPLES)
    return np.array([scores.figure(each) for each in counts @ sums])


def _quantiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    if np.isnan(drawn).all():
        return math.nan, math.nan
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _by_group(n_rows: int, groups: Sequence[str] | None) -> list[np.ndarray]:
    """Row numbers of each group, in order of first appearance."""
    if n_rows == 0:
        raise DataError("There are no rows to compute a figure from.")
    if groups is None:
        return [np.array([row]) for row in range(n_rows)]
    if len(groups) != n_rows:
        raise ValueError(f"{len(groups)} groups for {n_rows} rows")
    found: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(group, []).append(row)
    return [np.array(rows) for rows in found.values()]


def _group_sums(rows: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    return np.stack([rows[part].sum(axis=0) for part in parts])


# ---------------------------------------------------------------- two models on the same rows


def compare(first: Scores, second: Scores, groups: Sequence[str] | None = None, *, seed: int = 0) -> Comparison:
    """Paired comparison of two models on the same rows in the same order.

    The test: exact McNemar where every row is simply right or wrong and stands alone, else a paired permutation test, which
    swaps the two models' answers of whole groups (Noreen, 1989). Raises `DataError` when the rows do not pair up.
    """
    if first.rows.shape != second.rows.shape:
        raise DataError(f"{len(first.rows)} rows of one model and {len(second.rows)} of the other do not pair up.")
    parts = _by_group(len(first.rows), groups)
    difference = second.value() - first.value()
    drawn = _drawn(second, parts, seed) - _drawn(first, parts, seed)  # one seed: the same groups in both
    pseudo = _pseudo_values(first, second, parts)
    spread = float(np.std(pseudo, ddof=1)) if len(pseudo) > 1 else math.nan
    p_value, test = _test(first, second, parts, seed)
    return Comparison(
        first=first.value(),
        second=second.value(),
        difference=difference,
        interval=_quantiles(drawn, 0.95),
        p_value=p_value,
        test=test,
        effect_size=float(np.mean(pseudo)) / spread if spread > 0 else math.nan,
        n_rows=len(first.rows),
        n_groups=len(parts),
        n_needed=rows_needed(difference, spread),
        is_lower_better=first.is_lower_better,
    )


def _test(first: Scores, second: Scores, parts: list[np.ndarray], seed: int) -> tuple[float, str]:
    if len(parts) == len(first.rows) and _is_right_or_wrong(first) and _is_right_or_wrong(second):
        return mcnemar(first.rows[:, 0] > 0, second.rows[:, 0] > 0), "exact McNemar"
    swaps, is_exact = _swaps(len(parts), seed, _RESAMPLES_BY_ROWS if first.by_rows else _RESAMPLES)
    observed = abs(second.value() - first.value())
    drawn = np.abs(_swapped(first, second, parts, swaps))
    n_as_large = int((drawn >= observed - 1e-12 * max(1.0, observed)).sum())
    if is_exact:
        return n_as_large / len(drawn), "exact permutation"
    return (1 + n_as_large) / (1 + len(drawn)), "permutation"


def _is_right_or_wrong(scores: Scores) -> bool:
    return scores.figure is _ratio and bool(np.isin(scores.rows[:, 0], (0, 1)).all() and (scores.rows[:, 1] == 1).all())


def _swaps(n_groups: int, seed: int, resamples: int) -> tuple[np.ndarray, bool]:
    if n_groups <= _EXACT_GROUPS:
        return np.array(list(product((False, True), repeat=n_groups))), True
    return np.random.default_rng(seed).random((resamples, n_groups)) < 0.5, False


def _swapped(first: Scores, second: Scores, parts: list[np.ndarray], swaps: np.ndarray) -> np.ndarray:
    """Difference of the figures after each assignment of the groups' answers, float [R]."""
    if first.by_rows:
        owner = np.empty(len(first.rows), dtype=np.int64)
        for number, part in enumerate(parts):
            owner[part] = number
        masks = (swap[owner][:, None] for swap in swaps)
        return np.array(
            [
                first.figure(np.where(mask, first.rows, second.rows))
                - first.figure(np.where(mask, second.rows, first.rows))
                for mask in masks
            ]
        )
    a, b = _group_sums(first.rows, parts), _group_sums(second.rows, parts)
    moved = swaps.astype(np.float64) @ (a - b)
    totals = a.sum(axis=0), b.sum(axis=0)
    return np.array([first.figure(totals[1] + each) - first.figure(totals[0] - each) for each in moved])


def _pseudo_values(first: Scores, second: Scores, parts: list[np.ndarray]) -> np.ndarray:
    """Jackknife pseudo-values of the difference, one a group (Tukey, 1958); of a mean over rows, the rows' differences."""
    n = len(parts)
    if n < 2:
        return np.array([second.value() - first.value()])

    def without(scores: Scores) -> np.ndarray:
        if scores.by_rows:
            return np.array([scores.figure(np.delete(scores.rows, part, axis=0)) for part in parts])
        return np.array([scores.figure(each) for each in scores.rows.sum(axis=0) - _group_sums(scores.rows, parts)])

    whole = second.value() - first.value()
    return np.asarray(n * whole - (n - 1) * (without(second) - without(first)))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p-value that two classifiers err equally often; both bool [n] (McNemar, 1947)."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n = only_first + only_second
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1)) / (1 << n)
    return min(1.0, 2 * tail)


def rows_needed(difference: float, spread: float, *, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Pairs with which a difference is shown with that power: ((z₁₋α/₂ + z_power) · spread / difference)², rounded up.

    `None` where there is no difference, or no spread to judge it by.
    """
    if not (math.isfinite(difference) and math.isfinite(spread)) or difference == 0:
        return None
    normal = NormalDist()
    z = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    return max(2, math.ceil((z * spread / difference) ** 2))


def comparison_words(comparison: Comparison, first: str, second: str, *, scale: float = 1.0, unit: str = "") -> str:
    """The verdict in plain words; figures are multiplied by `scale` and followed by `unit`."""
    unit = f" {unit}" if unit else ""
    low, high = (bound * scale for bound in comparison.interval)
    size, half = abs(comparison.difference) * scale, (high - low) / 2
    if comparison.p_value < 0.05 and low * high > 0:
        is_second = (comparison.difference < 0) == comparison.is_lower_better
        return f"{second if is_second else first} is better by {size:.3g} ± {half:.2g}{unit} (p = {_p(comparison)})"
    words = f"no difference shown between {first} and {second} ({size:.3g} ± {half:.2g}{unit}, p = {_p(comparison)})"
    if comparison.test == "exact permutation" and 2.0 ** (1 - comparison.n_groups) > 0.05:
        words += f"; {comparison.n_groups} sources are too few for the test to show any"
    elif comparison.n_needed is not None and comparison.n_needed > comparison.n_groups:
        words += f"; n = {comparison.n_needed:,} would be needed to show this one, there are {comparison.n_groups:,}"
    return words


def _p(comparison: Comparison) -> str:
    return "< 0.001" if comparison.p_value < 0.001 else f"{comparison.p_value:.2g}"


# ---------------------------------------------------------------- seeds


@dataclass(frozen=True)
class NoiseFloor:
    """What changing nothing but the seed does to a figure."""

    mean: float
    spread: float
    """Standard deviation over seeds."""
    n_seeds: int
    detectable: float
    """Smallest difference of two means, each over as many seeds, that is beyond the noise at 95 %."""


def noise_floor(values: Sequence[float]) -> NoiseFloor:
    """The noise floor from runs that differ only by their seed. Raises `DataError` for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        raise DataError("A noise floor needs at least two seeds.")
    n, spread = len(values), float(np.std(values, ddof=1))
    detectable = float(stats.t.ppf(0.975, 2 * n - 2)) * spread * math.sqrt(2 / n)
    return NoiseFloor(float(np.mean(values)), spread, n, detectable)


@dataclass(frozen=True)
class SeedVerdict:
    """Whether the difference of two settings is more than what seeds do."""

    difference: float
    """Mean of the second less mean of the first."""
    half_width: float
    """Half of its 95 % interval."""
    p_value: float
    """Welch's t-test."""
    is_beyond_noise: bool


def compare_seeds(first: Sequence[float], second: Sequence[float]) -> SeedVerdict:
    """Welch's unequal-variances t-test (Welch, 1947) of two settings, each run over several seeds."""
    from scipy import stats

    if min(len(first), len(second)) < 2:
        raise DataError("A verdict beyond the noise needs at least two seeds of each setting.")
    difference = float(np.mean(second) - np.mean(first))
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return SeedVerdict(difference, 0.0, 1.0 if difference == 0 else 0.0, difference != 0)
    found = stats.ttest_ind(second, first, equal_var=False)
    low, high = found.confidence_interval(0.95)
    p_value = float(found.pvalue)
    return SeedVerdict(difference, float(high - low) / 2, p_value, p_value < 0.05)
