"""Documents on disk: all texts of a split in one file, with their names and where each begins."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kajiya.data.mapped import map_file
from kajiya.data.names import Names, NamesWriter, open_names
from kajiya.errors import StoreError

SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Documents:
    """The documents of one split of a corpus, memory-mapped.

    Layout: `<split>.bin` (the UTF-8 bytes of all documents, one behind the other), `<split>.offsets.npy` (int64, where each
    begins, and the end), and the names (`kajiya.data.names`).
    """

    folder: Path
    split: str
    offsets: np.ndarray
    """Where each document begins, bytes; int64 [n + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.offsets[-1])

    @cached_property
    def names(self) -> Names:
        """The documents' names, in order."""
        return open_names(self.folder, self.split)

    @cached_property
    def raw(self) -> np.ndarray:
        """All bytes, uint8, memory-mapped."""
        return map_file(self.folder / f"{self.split}.bin", np.dtype(np.uint8))

    def read(self, index: int) -> bytes:
        """The bytes of one document. They are read, not mapped, so that a pass over all leaves no page resident."""
        start, stop = self.offsets[index : index + 2].tolist()
        with (self.folder / f"{self.split}.bin").open("rb", buffering=0) as handle:
            handle.seek(start)
            pieces = []
            while start < stop and (piece := handle.read(stop - start)):
                pieces.append(piece)
                start += len(piece)
        return b"".join(pieces)

    def text(self, index: int) -> str:
        """The text of one document."""
        return self.read(index).decode()

    def texts(self) -> Iterator[str]:
        """All texts, in order."""
        return (self.text(index) for index in range(len(self)))

    def spans(self, n_bytes: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Runs of documents of at most `n_bytes` together (at least one document) between two indices, in order."""
        end = len(self) if stop is None else stop
        while start < end:
            stop = int(np.searchsorted(self.offsets, self.offsets[start] + n_bytes, side="right")) - 1
            stop = min(max(stop, start + 1), end)
            yield start, stop
            start = stop

    def batches(self, n_bytes: int) -> Iterator[tuple[int, list[str]]]:
        """The texts of these runs, each with its first index."""
        for start, stop in self.spans(n_bytes):
            yield start, [self.text(index) for index in range(start, stop)]


class DocumentWriter:
    """Appends documents to a split's files, within a `with` block; `finish` writes the index."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        self._split = split
        self._handle = (folder / f"{split}.bin").open("wb")
        self._names = NamesWriter(folder, split)
        self._lengths = array("q")

    def add(self, name: str, raw: bytes) -> None:
        """Append one document."""
        self._handle.write(raw)
        self._names.add(name)
        self._lengths.append(len(raw))

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._handle.close()
        finally:
            self._names.close()

    def finish(self) -> Documents:
        """Write names and offsets; return what was written."""
        self._handle.close()
        self._names.finish()
        np.save(self._folder / f"{self._split}.offsets.npy", cumulated(np.frombuffer(self._lengths, dtype=np.int64)))
        return open_documents(self._folder, self._split)


def close_up(documents: Documents, stays: np.ndarray) -> None:
    """Take documents out of a split, in place, so that no second copy of the text is ever on the disk.

    `stays` is bool [n]. The files are written anew under their names; `documents` is of no use afterwards.
    """
    indices = np.flatnonzero(stays)
    with (documents.folder / f"{documents.split}.bin").open("r+b") as handle:
        for index in indices:
            handle.write(documents.read(int(index)))
        handle.truncate()
    write_names(documents.folder, documents.split, (documents.names[int(index)] for index in indices))
    np.save(documents.folder / f"{documents.split}.offsets.npy", cumulated(np.diff(documents.offsets)[indices]))


def write_names(folder: Path, split: str, names: Iterable[str]) -> None:
    """Write the names of a split's documents; they may come from the very file that is written."""
    writer = NamesWriter(folder, split)
    for name in names:
        writer.add(name)
    writer.finish()


def open_documents(folder: Path, split: str) -> Documents:
    """The documents of a split (`train`, `heldout`) of the corpus in `folder`."""
    path = folder / f"{split}.offsets.npy"
    if not path.is_file():
        raise StoreError(f"{folder}: no corpus with a split {split!r} is there")
    return Documents(folder, split, np.load(path, allow_pickle=False))


def cumulated(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Where each item begins when they lie one behind the other, and the end; int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
