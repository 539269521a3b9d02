"""Texts as sets of word sequences, each sequence a 64-bit number: what near-duplicates and contamination are measured on."""

import json
import re
from functools import lru_cache
from typing import Any

import numpy as np

from kajiya.data.digests import short_digest

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str, n_words: int) -> np.ndarray:
    """The distinct sequences of `n_words` words of a text, uint64, rising; fewer words than that are one sequence.

    Words are runs of letters, digits and underscores, without regard to case; a text without any has no sequence.
    """
    words = _WORD.findall(text.casefold())
    if not words:
        return np.zeros(0, dtype=np.uint64)
    numbers = np.fromiter((_number(word) for word in words), dtype=np.uint64, count=len(words))
    n = min(n_words, len(words))
    hashes = np.zeros(len(words) - n + 1, dtype=np.uint64)
    # A polynomial in an odd factor, modulo 2^64: each place of a word within the sequence counts differently.
    for place in range(n):
        hashes = hashes * _FACTOR + numbers[place : place + len(hashes)]
    return np.unique(hashes)


@lru_cache(maxsize=2**16)
def _number(word: str) -> int:
    return int.from_bytes(short_digest(word), "little")


def plain_text(raw: bytes, is_text: bool) -> str:
    """What is compared of a document: the text itself, or the strings of a structured row, one behind the other."""
    return raw.decode() if is_text else "\n".join(_strings(json.loads(raw)))


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != "role"]
    return [found for part in value for found in _strings(part)] if isinstance(value, list) else []
