"""How sure a figure is: intervals and paired tests by resampling whole sources, since rows of one source are not independent.

Shape letters: n rows, k statistics of a row, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kajiya.errors import DataError
from kajiya.evals.resampling import (
    Figure,
    Parts,
    by_group,
    drawn_by_rows,
    drawn_figures,
    drawn_ratios,
    left_out,
    left_out_by_rows,
    swapped_by_rows,
    swapped_figures,
    swaps,
)

_RESAMPLES = 2000
_RESAMPLES_BY_ROWS = 500
"""A figure that needs all rows anew (ranks) is recomputed less often."""
_ENOUGH_GROUPS = 6
"""Of fewer groups no bootstrap interval is one of 95 %: 2^(1 − 6) < 0.05."""


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

    @property
    def of_sums(self) -> str | None:
        """The name of its figure in `OF_SUMS`, if it has one there."""
        return next((name for name, figure in OF_SUMS.items() if figure is self.figure), None)

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


def sums_scores(rows: np.ndarray, name: str, is_lower_better: bool = False, points: float | None = None) -> Scores:
    """A figure of `OF_SUMS` by its name, of rows float64 [n, 2]."""
    return Scores(rows, OF_SUMS[name], is_lower_better=is_lower_better, points=points)


def _perplexity(sums: np.ndarray) -> float:
    return math.exp(-_ratio(sums)) if sums[1] else math.nan


def _bits(sums: np.ndarray) -> float:
    return -_ratio(sums) / math.log(2)


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


OF_SUMS: Mapping[str, Figure] = {"perplexity": _perplexity, "bits": _bits}
"""Figures of Σ log-likelihoods and Σ units (documents, words, bytes), in nats, by the names under which results keep them."""


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
    parts = by_group(len(scores.rows), groups)
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
    return _quantiles(drawn_ratios(numerators, denominators, resamples, seed), level)


def _drawn(scores: Scores, parts: Parts, seed: int, resamples: int = _RESAMPLES_BY_ROWS) -> np.ndarray:
    """The figure of every resample, float [R]; of one `by_rows`, R is `resamples`."""
    if scores.by_rows:
        return drawn_by_rows(scores.rows, scores.figure, parts, resamples, seed)
    return drawn_figures(scores.rows, scores.figure, parts, _RESAMPLES, seed)


def _quantiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    if np.isnan(drawn).all():
        return math.nan, math.nan
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---------------------------------------------------------------- two models on the same rows


def compare(first: Scores, second: Scores, groups: Sequence[str] | None = None, *, seed: int = 0) -> Comparison:
    """Paired comparison of two models on the same rows in the same order.

    The test: exact McNemar where every row is simply right or wrong and stands alone, else a paired permutation test, which
    swaps the two models' answers of whole groups (Noreen, 1989). Raises `DataError` when the rows do not pair up.
    """
    if first.rows.shape != second.rows.shape:
        raise DataError(f"{len(first.rows)} rows of one model and {len(second.rows)} of the other do not pair up.")
    parts = by_group(len(first.rows), groups)
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


def _test(first: Scores, second: Scores, parts: Parts, seed: int) -> tuple[float, str]:
    if len(parts) == len(first.rows) and _is_right_or_wrong(first) and _is_right_or_wrong(second):
        return mcnemar(first.rows[:, 0] > 0, second.rows[:, 0] > 0), "exact McNemar"
    exchanges, is_exact = swaps(len(parts), _RESAMPLES_BY_ROWS if first.by_rows else _RESAMPLES, seed)
    observed = abs(second.value() - first.value())
    swapped = swapped_by_rows if first.by_rows else swapped_figures
    drawn = np.abs(swapped(first.rows, second.rows, first.figure, parts, exchanges))
    n_as_large = int((drawn >= observed - 1e-12 * max(1.0, observed)).sum())
    if is_exact:
        return n_as_large / len(drawn), "exact permutation"
    return (1 + n_as_large) / (1 + len(drawn)), "permutation"


def _is_right_or_wrong(scores: Scores) -> bool:
    return scores.figure is _ratio and bool(np.isin(scores.rows[:, 0], (0, 1)).all() and (scores.rows[:, 1] == 1).all())


def _pseudo_values(first: Scores, second: Scores, parts: Parts) -> np.ndarray:
    """Jackknife pseudo-values of the difference, one a group (Tukey, 1958); of a mean over rows, the rows' differences.

    Of a figure `by_rows` of many groups, one a block of groups, spread as far as those of single groups would be.
    """
    whole = second.value() - first.value()
    if len(parts) < 2:
        return np.array([whole])
    leave = left_out_by_rows if first.by_rows else left_out
    without = leave(second.rows, second.figure, parts) - leave(first.rows, first.figure, parts)
    n = len(without)
    pseudo = n * whole - (n - 1) * without
    # That of a block is a mean over its groups, so it spreads less than theirs by the root of their number.
    return np.asarray(pseudo.mean() + (pseudo - pseudo.mean()) * math.sqrt(len(parts) / n))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p-value that two classifiers err equally often; both bool [n] (McNemar, 1947)."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n = only_first + only_second
    if n == 0:
        return 1.0
    from scipy import stats

    return float(stats.binomtest(only_first, n).pvalue)


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
        return words + f"; {comparison.n_groups} sources are too few for the test to show any"
    if (comparison.p_value < 0.05) != (low * high > 0):
        shown, not_shown = ("test", "interval") if comparison.p_value < 0.05 else ("interval", "test")
        words += f"; the {shown} alone would show one, the {not_shown} does not, with n = {comparison.n_groups:,}"
    if comparison.n_needed is not None and comparison.n_needed > comparison.n_groups:
        words += f"; n = {comparison.n_needed:,} would be needed to show this one, there are {comparison.n_groups:,}"
    return words


def few_groups_words(n_groups: int) -> str:
    """What is to be said of a bootstrap interval from so few groups; empty for enough.

    Of two to five groups even the interval from the least to the largest misses the truth in more than 5 % of all cases (it
    lies beyond all of n values with a chance of 2^(1 − n)).
    """
    return f"interval from {n_groups} sources, too few for 95 %" if 1 < n_groups < _ENOUGH_GROUPS else ""


def _p(comparison: Comparison) -> str:
    return "< 0.001" if comparison.p_value < 0.001 else f"{comparison.p_value:.2g}"
