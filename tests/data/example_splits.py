"""Splits of examples made by hand, in memory, for the tests of packing and rows."""

from pathlib import Path

import numpy as np

from kajiya.data.documents import cumulated
from kajiya.data.shards import Split

PAD = 2**31


def example_split(
    lengths: list[list[int]],
    weights: list[float] | None = None,
    labels: list[float] | None = None,
    file_tokens: int = 37,
) -> Split:
    """Examples whose tokens are all different (0, 1, 2 …), over several files; `lengths` has the sequences of each."""
    flat = [n for each in lengths for n in each]
    offsets = cumulated(flat)
    tokens = np.arange(offsets[-1], dtype="<u4")
    table = sorted(set(weights)) if weights is not None else None
    codes = None if weights is None or table is None else np.array([table.index(w) for w in weights], dtype=np.uint8)
    cuts = range(0, len(tokens), file_tokens)
    return Split(
        folder=Path(),
        name="train",
        files=tuple(tokens[cut : cut + file_tokens] for cut in cuts),
        offsets=offsets,
        document_bytes=np.array([sum(each) for each in lengths]),
        bos_id=0,
        eos_id=1,
        pad_id=PAD,
        is_text=False,
        segments=len(lengths[0]),
        codes=tuple(None if codes is None else codes[cut : cut + file_tokens] for cut in cuts),
        weights=tuple(None if table is None else np.array(table, dtype=np.float32) for _ in cuts),
        labels=None if labels is None else np.array(labels),
    )
