"""Names of documents in a file, looked up one at a time: millions of them take no memory."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from kajiya.data.mapped import map_file


@dataclass(frozen=True)
class Names(Sequence[str]):
    """The names, memory-mapped: `<split>.names.bin` (UTF-8, one behind the other) and `<split>.names.npy` (where each begins)."""

    raw: np.ndarray
    """All bytes, uint8."""
    offsets: np.ndarray
    """Where each name begins, and the end; int64 [n + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        start, stop = self.offsets[at : at + 2].tolist()
        return self.raw[start:stop].tobytes().decode("utf-8", "surrogatepass")


class NamesWriter:
    """Appends names beside their place; `finish` puts them there."""

    def __init__(self, folder: Path, split: str) -> None:
        self._path = folder / f"{split}.names.bin"
        self._beside = self._path.with_suffix(".new")
        self._handle = self._beside.open("wb")
        self._offsets = array("q", [0])

    def add(self, name: str) -> None:
        """Append one name."""
        raw = name.encode("utf-8", "surrogatepass")
        self._handle.write(raw)
        self._offsets.append(self._offsets[-1] + len(raw))

    def finish(self) -> None:
        """Put the names in their place."""
        self._handle.close()
        self._beside.replace(self._path)
        np.save(self._path.with_suffix(".npy"), np.frombuffer(self._offsets, dtype=np.int64))

    def close(self) -> None:
        """Leave nothing open."""
        self._handle.close()


def open_names(folder: Path, split: str) -> Names:
    """The names of a split's documents, from the folder of a corpus or of shards."""
    path = folder / f"{split}.names.bin"
    return Names(
        map_file(path, np.dtype(np.uint8)),
        np.asarray(np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)),
    )
