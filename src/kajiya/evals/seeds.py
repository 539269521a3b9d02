"""What changing nothing but the seed does to a figure, and whether two settings differ by more than that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kajiya.errors import DataError


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
