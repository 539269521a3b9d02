"""Arrays that lie in files."""

from pathlib import Path

import numpy as np


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only memory-mapped array; an empty file as an empty array (which no system maps)."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    # A plain array over the map: slices of a memmap cost ten times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
