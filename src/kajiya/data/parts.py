"""Writing shards: the documents of a split tokenized part by part; a finished part outlives a kill and is never made again.

A part is one shard file: the tokens of a run of whole documents, and beside it the lengths of its sequences, the weights of
its targets and its labels where it has such. Its `.json` is written last: a part without it is none.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.data.documents import Documents
from kajiya.data.progress import Progress
from kajiya.errors import DataError
from kajiya.run.files import read_json, write_json

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
    """Every part of the split, in order: found finished in `folder`, or made."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (start, stop) in enumerate(documents.spans(portions.part_bytes)):
        # Nine digits, so that sorting the names sorts the files.
        path = folder / f"{documents.split}-{number:09d}.bin"
        if not path.with_suffix(".json").is_file():
            _write_part(path, documents, (start, stop), encode, portions, progress)
        else:
            progress.add(int(documents.offsets[stop] - documents.offsets[start]))
        parts.append(_open_part(path))
    return parts


def _open_part(path: Path) -> Part:
    meta = read_json(path.with_suffix(".json"))
    return Part(path, meta["tokens"], meta["weights"], meta["labels"])


def _write_part(
    path: Path, documents: Documents, span: tuple[int, int], encode: Encode, portions: Portions, progress: Progress
) -> None:
    """Write one part beside its place and move it there; memory holds `n_ahead` chunks."""
    beside = path.with_suffix(f".{os.getpid()}")
    table: dict[float, int] = {}
    lengths, labels, n_tokens = [], [], 0
    weights_beside = beside.with_name(beside.name + ".weights")
    with beside.open("wb") as tokens_file, weights_beside.open("wb") as weights_file:
        for start, stop, encoded in _encoded(documents, span, encode, portions):
            encoded.tokens.tofile(tokens_file)
            n_tokens += len(encoded.tokens)
            lengths.append(encoded.lengths)
            if encoded.weights is not None:
                _codes(encoded.weights, table, path.name).tofile(weights_file)
            if encoded.labels is not None:
                labels.append(encoded.labels)
            progress.add(int(documents.offsets[stop] - documents.offsets[start]))
        for handle in (tokens_file, weights_file):
            handle.flush()
            os.fsync(handle.fileno())
    np.save(path.with_suffix(".lengths.npy"), np.concatenate([np.zeros(0, dtype=np.int64), *lengths]))
    if labels:
        np.save(path.with_suffix(".labels.npy"), np.concatenate(labels))
    if table:
        weights_beside.replace(path.with_suffix(".weights"))
    else:
        weights_beside.unlink()
    beside.replace(path)
    meta = {"tokens": n_tokens, "weights": list(table) or None, "labels": bool(labels)}
    write_json(path.with_suffix(".json"), meta)


def _encoded(
    documents: Documents, span: tuple[int, int], encode: Encode, portions: Portions
) -> Iterator[tuple[int, int, Encoded]]:
    """The chunks of a part in order, a few of them in work at a time."""
    chunks = documents.spans(portions.chunk_bytes, *span)
    with ThreadPoolExecutor(portions.n_ahead) as pool:
        waiting = [
            (chunk, pool.submit(encode, *chunk)) for _, chunk in zip(range(portions.n_ahead), chunks, strict=False)
        ]
        while waiting:
            (start, stop), future = waiting.pop(0)
            encoded = future.result()
            following = next(chunks, None)
            if following is not None:
                waiting.append((following, pool.submit(encode, *following)))
            yield start, stop, encoded


def _codes(weights: np.ndarray, table: dict[float, int], name: str) -> np.ndarray:
    """Each weight's number in the table, uint8; weights not seen before are added to it."""
    found, places = np.unique(weights, return_inverse=True)
    for weight in found.tolist():
        table.setdefault(weight, len(table))
    if len(table) > MAX_WEIGHTS:
        raise DataError(
            f"{name}: the messages have more than {MAX_WEIGHTS} different weights, and each is kept as one byte.\n"
            "Round them, for example to hundredths."
        )
    codes = np.array([table[weight] for weight in found.tolist()], dtype=np.uint8)
    return codes[places]


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
        import shutil

        shutil.copyfile(path, target)


def write_names(path: Path, names: list[str]) -> None:
    """The documents' names, in order."""
    path.write_text(json.dumps(names), encoding="utf-8")
