"""Text to token ids, fast, and so that text never turns into a special token."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kajiya.errors import StoreError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_encoder(folder: Path) -> "Tokenizer":
    """The encoder of the tokenizer in `folder`: no padding, no cutting, special tokens' names taken as plain text."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StoreError(f"{path}: no such file; no tokenizer is there")
    encoder = Tokenizer.from_file(str(path))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode_texts(encoder: "Tokenizer", texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, int64, without any token added; all cores are used."""
    return [
        np.array(encoding.ids, dtype=np.int64)
        for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]
