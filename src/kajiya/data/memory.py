"""How much memory preparing the data takes: what is held at once is cut so that the cap in the config is kept."""

from dataclasses import dataclass

import numpy as np

from kajiya.data.documents import Documents
from kajiya.data.parts import Portions
from kajiya.errors import DataError
from kajiya.run.usage import peak_memory

_LARGEST_CHUNK = 4 * 2**20
_SMALLEST_CHUNK = 2**16


@dataclass(frozen=True)
class Appetite:
    """What encoding takes, measured on code and on Chinese as one document of 10 to 100 MB."""

    bytes_per_byte: int
    """Bytes of memory for each byte of text in work, at the most."""
    n_ahead: int
    """Chunks in work at a time."""
    kept_bytes: int = 0
    """What the encoder keeps of text that it has seen, at the most."""


FAST = Appetite(32, 2, 40 * 2**20)
PLAIN = Appetite(120, 1)
ROWS = Appetite(120, 1, FAST.kept_bytes)
"""Of rows that are rendered: their pieces of text go to the fast encoder, and its memory of them is kept."""


def has_room(memory_mib: int, appetite: Appetite) -> bool:
    """Whether the cap leaves room for such an encoder, and for the smallest chunks."""
    return _budget(memory_mib, appetite) >= _SMALLEST_CHUNK * appetite.bytes_per_byte * appetite.n_ahead


def room_bytes(memory_mib: int) -> int:
    """What the cap leaves beside what the process has taken so far, bytes."""
    cap = memory_mib * 2**20
    room = cap - peak_memory()
    # A process that was larger before it prepares anything cannot keep the cap, which then bounds what is added.
    return room if room > 0 else cap // 2


def _budget(memory_mib: int, appetite: Appetite) -> int:
    return room_bytes(memory_mib) - appetite.kept_bytes


def portions_within(memory_mib: int, splits: list[Documents], appetite: Appetite, part_bytes: int) -> Portions:
    """Portions whose encoding stays under the cap.

    Raises `DataError` for a document that could not be encoded under it: a document is never divided.
    """
    budget = _budget(memory_mib, appetite)
    for documents in splits:
        if not len(documents):
            continue
        sizes = np.diff(documents.offsets)
        largest = int(np.argmax(sizes))
        needed = int(sizes[largest]) * appetite.bytes_per_byte
        if max(needed, _SMALLEST_CHUNK * appetite.bytes_per_byte) > budget:
            raise DataError(
                f"{documents.names[largest]}: {sizes[largest] / 2**20:.1f} MiB of text, which may take "
                f"{needed / 2**20:,.0f} MiB of memory beside the {peak_memory() / 2**20:,.0f} MiB that the process has; "
                f"data.memory_mib={memory_mib}.\nRaise data.memory_mib, or divide the document (a "
                "text file is cut at data.source.options.split_on)."
            )
    chunk_bytes = budget // (appetite.bytes_per_byte * appetite.n_ahead)
    return Portions(part_bytes, max(_SMALLEST_CHUNK, min(_LARGEST_CHUNK, chunk_bytes)), appetite.n_ahead)
