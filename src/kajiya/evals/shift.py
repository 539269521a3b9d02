"""How far two data sets, or two models' outputs, lie apart: Wasserstein, Kolmogorov–Smirnov, PSI, and maps of embeddings."""

import importlib.util
from dataclasses import dataclass

import numpy as np

from kajiya.errors import DataError, MissingExtraError

_PSI_BINS = 10
_PSI_FLOOR = 1e-4
"""Share given to an empty bin, whose logarithm would be infinite."""


@dataclass(frozen=True)
class Shift:
    """Distance between two samples of one quantity."""

    wasserstein: float
    """Earth mover's distance, in the quantity's own unit."""
    ks: float
    """Largest difference of the two distribution functions, 0 to 1."""
    ks_p_value: float
    psi: float
    """Population stability index; below 0.1 is customarily called stable, above 0.25 shifted."""

    @property
    def verdict(self) -> str:
        """How large it is by PSI, and whether the KS test shows any: few rows make a large PSI by chance."""
        size = "no" if self.psi < 0.1 else "a moderate" if self.psi < 0.25 else "a large"
        is_doubtful = self.psi >= 0.1 and self.ks_p_value >= 0.05
        return f"{size} shift" + (", but none is shown by the KS test" if is_doubtful else "")

    @property
    def words(self) -> str:
        """The verdict with its figures."""
        figures = (
            f"PSI {self.psi:.3f}, KS {self.ks:.3f} with p = {self.ks_p_value:.2g}, Wasserstein {self.wasserstein:.4g}"
        )
        return f"{self.verdict} ({figures})"


def measure_shift(reference: np.ndarray, other: np.ndarray) -> Shift:
    """The shift from `reference` to `other`, both float [n] of any lengths. Raises `DataError` for an empty or non-finite one."""
    from scipy import stats

    for name, values in (("reference", reference), ("other", other)):
        if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise DataError(f"The {name} sample must be a row of finite numbers, at least one.")
    test = stats.ks_2samp(reference, other)
    return Shift(
        float(stats.wasserstein_distance(reference, other)),
        float(test.statistic),
        float(test.pvalue),
        population_stability(reference, other),
    )


def population_stability(reference: np.ndarray, other: np.ndarray, bins: int = _PSI_BINS) -> float:
    """Σ (q − p) ln(q / p) over bins that cut `reference` into equal shares (Siddiqi, 2006)."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, bins + 1)[1:-1]))
    p, q = (
        np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) / len(values)
        for values in (reference, other)
    )
    p, q = np.maximum(p, _PSI_FLOOR), np.maximum(q, _PSI_FLOOR)
    return float(((q - p) * np.log(q / p)).sum())


def embedding_shift(reference: np.ndarray, other: np.ndarray, components: int = 8) -> list[Shift]:
    """The shift along each principal direction of the reference embeddings, [n, d] and [m, d]."""
    mean, axes = _principal_axes(reference, components)
    return [
        measure_shift(a, b) for a, b in zip(((reference - mean) @ axes.T).T, ((other - mean) @ axes.T).T, strict=True)
    ]


def map_embeddings(vectors: np.ndarray, kind: str = "pca", seed: int = 0) -> np.ndarray:
    """Embeddings [n, d] as points in a plane [n, 2]: `pca`, or `umap` (McInnes et al., arXiv:1802.03426)."""
    if kind == "pca":
        mean, axes = _principal_axes(vectors, 2)
        return np.asarray((vectors - mean) @ axes.T)
    if kind != "umap":
        raise DataError(f"{kind!r} is no kind of map; there are pca and umap.")
    if importlib.util.find_spec("umap") is None:
        raise MissingExtraError("umap-learn", "viz", "A UMAP map")
    from umap import UMAP

    neighbours = max(2, min(15, len(vectors) - 1))
    return np.asarray(UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(vectors))


def _principal_axes(vectors: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and the first principal directions [n, d], each with its largest entry positive."""
    if vectors.ndim != 2 or len(vectors) < 2:
        raise DataError("A map needs at least two embeddings.")
    mean = vectors.mean(axis=0)
    axes = np.linalg.svd(vectors - mean, full_matrices=False)[2][:n]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    return mean, axes * signs[:, None]
