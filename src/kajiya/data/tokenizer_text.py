"""The text that a tokenizer is trained on: all of it, or documents spread evenly where all would take too much memory.

A BPE trainer holds every distinct word (as its pre-tokenizer cuts the text) with the pairs in it. How many there are is
told by a sample, so that the amount is a function of the text and the cap alone, and a tokenizer is the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kajiya.data.documents import Documents
from kajiya.data.formats import row_text

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_PIECE = 2**17
"""A longer document is taken in pieces, cut behind a line where there is one: a tokenizer needs 100 times their memory."""
_SAMPLE_BYTES = 4 * 2**20
_BYTES_PER_BYTE = 110
"""Memory for each byte of the distinct words; measured on random words, on Chinese (105 each) and on code (less)."""
_SHARE = 0.4
"""Of the cap, what the words may take; the rest is the process's own."""


@dataclass(frozen=True)
class TrainingText:
    """Which of the documents' pieces are given to the trainer."""

    documents: Documents
    kind: str
    """Of the rows."""
    every: int = 1
    """One piece in so many."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the documents' pieces that are given, about."""
        return self.documents.n_bytes // self.every

    def texts(self) -> Iterator[str]:
        """The pieces, in order."""
        number = 0
        for index in range(len(self.documents)):
            size = int(self.documents.offsets[index + 1] - self.documents.offsets[index])
            n_pieces = n_pieces_of(size)
            if -number % self.every < n_pieces:
                text = row_text(self.kind, self.documents.text(index))
                yield from pieces_of(text)[-number % self.every :: self.every]
            number += n_pieces


def needs_no_cap(documents: Documents, memory_mib: int) -> bool:
    """Whether all text can be given even if no word in it came twice."""
    return documents.n_bytes * _BYTES_PER_BYTE <= _SHARE * memory_mib * 2**20


def text_within(documents: Documents, kind: str, memory_mib: int, words: "PreTokenizer") -> TrainingText:
    """As much text as the trainer can take under the cap: all of it where that is enough."""
    whole = TrainingText(documents, kind)
    if needs_no_cap(documents, memory_mib):
        return whole
    sample = TrainingText(documents, kind, every=max(1, documents.n_bytes // _SAMPLE_BYTES))
    distinct: set[str] = set()
    n_bytes = 0
    for text in sample.texts():
        n_bytes += len(text.encode())
        distinct.update(word for word, _ in words.pre_tokenize_str(text))
        if n_bytes >= 2 * _SAMPLE_BYTES:
            break
    # Bytes of byte-level words are characters. A larger text has no larger share of distinct words than its sample.
    share = sum(map(len, distinct)) / max(1, n_bytes)
    most = _SHARE * memory_mib * 2**20 / (share * _BYTES_PER_BYTE)
    return TrainingText(documents, kind, every=max(1, -int(-documents.n_bytes // most)))


def pieces_of(text: str) -> list[str]:
    """The text in pieces of about one size, each but the last ending behind a line where there is one near."""
    n = n_pieces_of(len(text.encode()))
    pieces, start = [], 0
    for number in range(1, n):
        wanted = len(text) * number // n
        at = text.find("\n", wanted, wanted + len(text) // n) + 1 or wanted
        pieces.append(text[start:at])
        start = at
    return [*pieces, text[start:]]


def n_pieces_of(n_bytes: int) -> int:
    """Into how many pieces a text of so many bytes is cut."""
    return max(1, -(-n_bytes // _PIECE))
