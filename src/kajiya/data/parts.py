"""Writing shards: the documents of a split tokenized part by part; a finished part outlives a kill and is never made again.

A part is one shard file: the tokens of a run of whole documents, and beside it the lengths of its sequences, the weights of
its targets and its labels where it has such. Its `.json` is written last: a part without it is none.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kajiya.data.documents import Documents
from kajiya.data.progress import Progress
from kajiya.errors import DataError, StoreError
from kajiya.run.files import is_full_disk, read_json, write_json

MAX_WEIGHTS = 256
"""Different weights of targets that one part can hold: each is stored as one byte."""


@dataclass(frozen=True)
class Encoded:
    """The examples of a run of documents, their sequences one behind the other."""

    tokens: np.ndarray
    """Token ids; unsigned integers [n]."""
    lengths: np.ndarray
    """Tokens of each sequence; int64 [sequences]."""
    weights: np.ndarray | None = None
    """Weight of each token as a target, float32 [n]; `None`: all 1."""
    labels: np.ndarray | None = None
    """Label of each example, int64 or float64 [examples]."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Documents that were left out, and why."""


Encode = Callable[[int, int], Encoded]
"""The examples of the documents from one index to before another."""


@dataclass(frozen=True)
class Part:
    """One finished shard file."""

    path: Path
    """Its tokens, `<split>-<number>.bin`."""
    n_tokens: int
    weights: list[float] | None
    """What the bytes of `.weights` stand for; `None`: there are none, all are 1."""
    has_labels: bool
    dropped: dict[int, str]
    """Documents that were left out, and why."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence; int64."""
        return np.asarray(np.load(self.path.with_suffix(".lengths.npy"), allow_pickle=False))

    @property
    def labels(self) -> np.ndarray:
        """Label of each example."""
        return np.asarray(np.load(self.path.with_suffix(".labels.npy"), allow_pickle=False))


@dataclass(frozen=True)
class Portions:
    """How a split is cut for the work."""

    part_bytes: int
    """Text behind one shard file, bytes."""
    chunk_bytes: int
    """Text that is encoded at once, bytes."""
    n_ahead: int
    """Chunks in work at a time."""


def write_parts(
    folder: Path, documents: Documents, encode: Encode, portions: Portions, progress: Progress
) -> list[Part]:
    """Every part of the split, in order: found finished in `folder`, or made.

    Raises `StoreError` when the disk is full; the finished parts stay, and the next attempt goes on behind them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (start, stop) in enumerate(documents.spans(portions.part_bytes)):
        # Nine digits, so that sorting the names sorts the files.
        path = folder / f"{documents.split}-{number:09d}.bin"
        if not path.with_suffix(".json").is_file():
            _make_part(path, documents, _encoded(documents, (start, stop), encode, portions, progress))
        else:
            progress.add(int(documents.offsets[stop] - documents.offsets[start]))
        parts.append(_open_part(path))
    return parts


def _open_part(path: Path) -> Part:
    meta = read_json(path.with_suffix(".json"))
    dropped = {int(index): reason for index, reason in meta["dropped"].items()}
    return Part(path, meta["tokens"], meta["weights"], meta["labels"], dropped)


def _make_part(path: Path, documents: Documents, chunks: Iterator[tuple[range, Encoded]]) -> None:
    """Write one part beside its place and move it there."""
    beside = path.with_suffix(f".{os.getpid()}")
    weights_beside = beside.with_suffix(f"{beside.suffix}w")
    try:
        with beside.open("wb") as tokens_file, weights_beside.open("wb") as weights_file:
            meta = _write_chunks(documents, chunks, path, tokens_file, weights_file)
            for handle in (tokens_file, weights_file):
                handle.flush()
                os.fsync(handle.fileno())
        if meta["weights"] is not None:
            weights_beside.replace(path.with_suffix(".weights"))
        beside.replace(path)
        write_json(path.with_suffix(".json"), meta)
    except OSError as problem:
        if not is_full_disk(problem):
            raise
        raise StoreError(
            f"{path.parent}: the disk is full.\n"
            "Free some space, or put the store elsewhere with --store; the parts already tokenized are kept."
        ) from problem
    finally:
        for left in (beside, weights_beside):
            left.unlink(missing_ok=True)


def _write_chunks(
    documents: Documents,
    chunks: Iterator[tuple[range, Encoded]],
    path: Path,
    tokens_file: BinaryIO,
    weights_file: BinaryIO,
) -> dict[str, Any]:
    """Write tokens, weights, lengths and labels; returns what the part's `.json` holds."""
    table: dict[float, int] = {}
    dropped: dict[int, str] = {}
    lengths, labels, n_tokens = [np.zeros(0, dtype=np.int64)], [], 0
    for span, encoded in chunks:
        # Not `tofile`, whose error on a full disk does not say so.
        tokens_file.write(encoded.tokens.data)
        n_tokens += len(encoded.tokens)
        dropped |= encoded.dropped
        lengths.append(encoded.lengths)
        if encoded.weights is not None:
            row = partial(_row_at, documents, span, encoded)
            weights_file.write(_codes(encoded.weights, table, row).data)
        if encoded.labels is not None:
            labels.append(encoded.labels)
    _save_synced(path.with_suffix(".lengths.npy"), np.concatenate(lengths))
    if labels:
        _save_synced(path.with_suffix(".labels.npy"), np.concatenate(labels))
    return {"tokens": n_tokens, "weights": list(table) or None, "labels": bool(labels), "dropped": dropped}


def _save_synced(path: Path, array: np.ndarray) -> None:
    """Write the array beside its place and move it there."""
    beside = path.with_suffix(f".{os.getpid()}n")
    try:
        with beside.open("wb") as handle:
            np.save(handle, array)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _encoded(
    documents: Documents, span: tuple[int, int], encode: Encode, portions: Portions, progress: Progress
) -> Iterator[tuple[range, Encoded]]:
    """The chunks of a part in order, and whose they are, a few of them in work at a time."""
    chunks = documents.spans(portions.chunk_bytes, *span)
    with ThreadPoolExecutor(portions.n_ahead) as pool:
        first = [chunk for _, chunk in zip(range(portions.n_ahead), chunks, strict=False)]
        waiting = [(chunk, pool.submit(encode, *chunk)) for chunk in first]
        while waiting:
            (start, stop), future = waiting.pop(0)
            encoded = future.result()
            following = next(chunks, None)
            if following is not None:
                waiting.append((following, pool.submit(encode, *following)))
            yield range(start, stop), encoded
            progress.add(int(documents.offsets[stop] - documents.offsets[start]))


def _codes(weights: np.ndarray, table: dict[float, int], row: Callable[[int], str]) -> np.ndarray:
    """Each weight's number in the table, uint8; weights not seen before are added to it. `row` names the row of a token."""
    found, firsts, places = np.unique(weights, return_index=True, return_inverse=True)
    # In the order in which they come, so that the table does not depend on how the rows are cut for the work.
    for at in np.sort(firsts).tolist():
        weight = float(weights[at])
        table.setdefault(weight, len(table))
        if len(table) > MAX_WEIGHTS:
            raise DataError(
                f"{row(at)}: has a message of weight={weight:g}; messages before it have {MAX_WEIGHTS} other weights, and no "
                "shard holds more.\nRound the weights of all rows, for example to hundredths."
            )
    codes = np.array([table[weight] for weight in found.tolist()], dtype=np.uint8)
    return codes[places]


def _row_at(documents: Documents, span: range, encoded: Encoded, at: int) -> str:
    """Name of the document whose token stands at this place of what was encoded of the span."""
    kept = [index for index in span if index not in encoded.dropped]
    sequence = int(np.searchsorted(np.cumsum(encoded.lengths), at, side="right"))
    return documents.names[kept[sequence * len(kept) // len(encoded.lengths)]]


def link_parts(parts: list[Part], folder: Path) -> list[dict[str, Any]]:
    """Bring the parts' files into `folder`, without copying where the disk allows; returns what the index says of each."""
    listed = []
    for part in parts:
        for path in (part.path, *([part.path.with_suffix(".weights")] if part.weights is not None else [])):
            _link(path, folder / path.name)
        listed.append({"name": part.path.name, "tokens": part.n_tokens, "weights": part.weights})
    return listed


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(path, target)
