"""How sure a figure is: intervals by resampling whole documents, since tokens of one document are not independent."""

import numpy as np


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of Σ numerators / Σ denominators, both float [n], resampling the n pairs (Efron, 1979)."""
    if len(numerators) == 0:
        raise ValueError("an interval needs at least one document")
    draws = np.random.default_rng(seed).integers(0, len(numerators), size=(resamples, len(numerators)))
    ratios = numerators[draws].sum(axis=1) / denominators[draws].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
