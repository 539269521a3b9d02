"""Compressors as honest baselines: their size of the held-out bytes, in bits per byte."""

import lzma
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

_DICTIONARY_BYTES = 1 << 26
"""Dictionary of `xz -9`, 64 MiB."""


def xz_size(data: bytes) -> int:
    """Bytes of `data` as an xz stream at level 9, the dictionary made larger where the data would not fit into it."""
    dictionary = max(_DICTIONARY_BYTES, min(len(data), 3 << 29))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def xz(train: bytes, heldout: bytes) -> float:
    """Bits per byte of the held-out bytes under xz alone; `train` is not used."""
    return 8 * xz_size(heldout) / len(heldout)


def xz_primed(train: bytes, heldout: bytes) -> float:
    """Bits per byte that the held-out bytes add to an xz stream that has seen the training bytes."""
    with ThreadPoolExecutor(2) as pool:  # lzma gives the interpreter lock up while it works
        both, alone = pool.map(xz_size, (train + heldout, train))
    return 8 * (both - alone) / len(heldout)


BASELINES: Mapping[str, Callable[[bytes, bytes], float]] = {"xz": xz, "xz-primed": xz_primed}
"""Baselines by the names that `eval.baselines` takes."""
