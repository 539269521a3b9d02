"""Digests seen so far and where each was seen first, in 24 bytes a place: for millions of rows a dictionary is too large."""

import hashlib
from array import array

_FIRST_PLACES = 1024


class Digests:
    """A hash table over 128-bit digests with open addressing (linear probing), at most two thirds full.

    Memory: 36 to 72 bytes for each digest; while it grows, half as much again.
    """

    def __init__(self) -> None:
        self._n = 0
        self._make(_FIRST_PLACES)

    def __len__(self) -> int:
        return self._n

    def first(self, digest: bytes) -> int | None:
        """The number that came with the digest (16 bytes) when it was added, or `None`."""
        place = self._place(*_halves(digest))
        return self._numbers[place] - 1 if self._numbers[place] else None

    def add(self, digest: bytes, number: int) -> None:
        """Remember the number (0 or more) for a digest that has none yet."""
        if 3 * (self._n + 1) > 2 * len(self._numbers):
            self._grow()
        high, low = _halves(digest)
        place = self._place(high, low)
        assert not self._numbers[place], "the digest has a number"
        self._high[place], self._low[place], self._numbers[place] = high, low, number + 1
        self._n += 1

    def _place(self, high: int, low: int) -> int:
        """Where the digest is, or the free place where it would be."""
        numbers, highs, lows = self._numbers, self._high, self._low
        mask = len(numbers) - 1
        place = high & mask
        while numbers[place] and not (highs[place] == high and lows[place] == low):
            place = (place + 1) & mask
        return place

    def _make(self, n_places: int) -> None:
        self._high, self._low, self._numbers = (array("Q", bytes(8 * n_places)) for _ in range(3))

    def _grow(self) -> None:
        held = zip(self._high, self._low, self._numbers, strict=True)
        self._make(2 * len(self._numbers))
        for high, low, number in held:
            if number:
                place = self._place(high, low)
                self._high[place], self._low[place], self._numbers[place] = high, low, number


def short_digest(text: str) -> bytes:
    """64 bits of BLAKE2b of a text, lone surrogates too: among millions, two that meet are rare and cost little."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def digest_of(raw: bytes) -> bytes:
    """128 bits of BLAKE2b: two different contents with one digest are not to be met with."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
