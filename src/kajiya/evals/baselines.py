"""Compressors as honest baselines: their size of the held-out bytes, in bits per byte."""

import lzma
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Bytes = bytes | memoryview | np.ndarray
"""Bytes in memory, or uint8 [n] of a mapped file."""

_DICTIONARY_BYTES = 1 << 26
"""Dictionary of `xz -9`, 64 MiB."""
PRIMING_BYTES = 1 << 26
"""Most of the training text that a compressor sees before the held-out text: a longer one would take gigabytes and hours."""
_PORTION_BYTES = 1 << 20


def xz_size(*parts: Bytes) -> int:
    """Bytes of the parts as one xz stream at level 9, whose dictionary holds them all up to twice that of `xz -9`.

    They are read a portion at a time, and the stream is nowhere kept.
    """
    views = [_view(part) for part in parts]
    dictionary = max(_DICTIONARY_BYTES, min(sum(map(len, views)), 2 * _DICTIONARY_BYTES))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    size = 0
    for view in views:
        for first in range(0, len(view), _PORTION_BYTES):
            size += len(compressor.compress(view[first : first + _PORTION_BYTES]))
    return size + len(compressor.flush())


def xz(train: Bytes, heldout: Bytes) -> float:
    """Bits per byte of the held-out bytes under xz alone; `train` is not used."""
    return 8 * xz_size(heldout) / len(heldout)


def xz_primed(train: Bytes, heldout: Bytes) -> float:
    """Bits per byte that the held-out bytes add to an xz stream that has seen the last 64 MiB of the training bytes."""
    seen = _view(train)[-PRIMING_BYTES:]
    with ThreadPoolExecutor(2) as pool:  # lzma gives the interpreter lock up while it works
        both, alone = pool.map(lambda parts: xz_size(*parts), ((seen, heldout), (seen,)))
    return 8 * (both - alone) / len(heldout)


def _view(part: Bytes) -> memoryview:
    return part.data if isinstance(part, np.ndarray) else memoryview(part)


BASELINES: Mapping[str, Callable[[Bytes, Bytes], float]] = {"xz": xz, "xz-primed": xz_primed}
"""Baselines by the names that `eval.baselines` takes."""
