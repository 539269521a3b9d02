"""Shards: every document tokenized once, as memory-mapped integers with the boundaries of its sequences.

A document of text is one sequence. A structured row is rendered (`kajiya.data.examples`) into the k sequences of an example,
with a weight for each target, and a label where its kind has one.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.schema import DataConfig
from kajiya.data.documents import SPLITS, Documents, cumulated, open_documents, write_names
from kajiya.data.encode import OpenedEncoder, PlainBulkEncoder, bulk_words, open_bulk_encoder, open_encoder
from kajiya.data.encoding import RenderMany, RowsEncoder, TextEncoder
from kajiya.data.mapped import map_file
from kajiya.data.memory import FAST, PLAIN, ROWS, has_room, portions_within
from kajiya.data.names import Names, open_names
from kajiya.data.parts import Encode, Part, link_parts, write_parts
from kajiya.data.progress import OnEvent, Progress, silent
from kajiya.data.render_processes import CHUNK_BYTES, RenderProcesses, RowsTask, processes_for
from kajiya.errors import DataError, StoreError
from kajiya.run.code import code_revision
from kajiya.run.files import read_json, require_space, write_json
from kajiya.run.store import Artifact, Store, produce
from kajiya.run.usage import peak_memory

STAGE = "shards"
_INDEX = "shards.json"
_SAMPLE_BYTES = 2**20
_SAMPLE_DOCUMENT = 2**16


@dataclass(frozen=True)
class Rendering:
    """How the rows of a structured corpus become examples."""

    open: Callable[[], RenderMany]
    """Opens the function that renders rows; it can be pickled, since of many rows processes of their own render each a part."""
    segments: int
    """Sequences of an example, k."""
    key: Any
    """What the shards depend on beside corpus, tokenizer and code: the format, the template, the settings."""
    code: tuple[str, ...]
    """Modules that render."""


def build_shards(
    config: DataConfig,
    corpus: Artifact,
    tokenizer: Artifact,
    store: Store,
    on_event: OnEvent = silent,
    rendering: Rendering | None = None,
) -> tuple[Artifact, bool]:
    """Tokenize both splits; returns the artifact, and whether it was there already.

    Each document of text becomes begin-of-text + ids + end-of-text; with a `rendering`, each is a row that becomes an
    example. Facts, for each split: `documents`, `tokens`, `bytes`, `bytes_per_token`, `shards`, and of rows `dropped`
    (documents, bytes, examples of reasons); `encoder` (which, and why); `peak_memory_bytes` (of the process, at the end, and of
    those that rendered for it).
    `row_tokens` is no part of the key; a text shorter than one row raises `DataError`. Killed, it goes on with the first part
    that is not finished.
    """
    dtype = np.dtype("<u2" if tokenizer.facts["vocab_size"] <= 2**16 else "<u4")
    segments = rendering.segments if rendering else 1
    drops = config.on_unreadable == "drop"
    unfinished: list[Path] = []

    def make(folder: Path) -> dict[str, Any]:
        parts_folder = folder.with_name(folder.name.rpartition(".")[0] + ".parts")
        unfinished.append(parts_folder)
        splits = [open_documents(corpus.path, split) for split in SPLITS]
        n_bytes = sum(documents.n_bytes for documents in splits)
        made = sum(path.stat().st_size for path in parts_folder.glob("*")) if parts_folder.is_dir() else 0
        require_space(folder, max(0, n_bytes * dtype.itemsize - made), "tokenizing")
        if rendering is None:
            opened = open_bulk_encoder(tokenizer.path, _sample(splits))
            if opened.is_fast and not has_room(config.memory_mib, FAST):
                words = f"tokenizers, since data.memory_mib={config.memory_mib} leaves no room for what fastokens keeps"
                opened = OpenedEncoder(PlainBulkEncoder(open_encoder(tokenizer.path)), words)
            appetite, words = (FAST if opened.is_fast else PLAIN), opened.words
        else:
            render, appetite, words = rendering.open(), ROWS, f"{bulk_words()}, rendered row by row"
        portions = portions_within(config.memory_mib, splits, appetite, config.shard_bytes)
        progress = Progress(on_event, STAGE, "bytes", n_bytes)
        facts: dict[str, Any] = {"encoder": words}
        index: dict[str, Any] = {"dtype": dtype.str, "is_text": rendering is None, "segments": segments} | special
        rendered_bytes = 0
        for documents in splits:
            if rendering is None:
                encode: Encode = TextEncoder(documents, opened.bulk, dtype, special["bos_id"], special["eos_id"])
                parts = write_parts(parts_folder, documents, encode, portions, progress)
            elif (n := processes_for(documents, config.memory_mib)) > 1:
                task = RowsTask(corpus.path, documents.split, rendering.open, dtype, segments, drops)
                shared = replace(portions, chunk_bytes=CHUNK_BYTES, n_ahead=2 * n)
                with RenderProcesses(task, n) as processes:
                    parts = write_parts(parts_folder, documents, processes, shared, progress)
                rendered_bytes = max(rendered_bytes, processes.peak_bytes)
            else:
                encode = RowsEncoder(documents, render, dtype, segments, drops)
                parts = write_parts(parts_folder, documents, encode, portions, progress)
            index[documents.split] = link_parts(parts, folder)
            facts[documents.split] = _write_index(folder, documents, parts, segments)
        progress.end()
        write_json(folder / _INDEX, index)
        facts["peak_memory_bytes"] = peak_memory() + rendered_bytes
        return facts | {name: value for name, value in index.items() if name not in SPLITS}

    special = {name: int(tokenizer.facts[name]) for name in ("bos_id", "eos_id", "pad_id")}
    artifact, reused = produce(
        store,
        STAGE,
        code=code_revision("kajiya.data.shards", *(rendering.code if rendering else ())),
        config={"shard_bytes": config.shard_bytes}
        | ({"rendering": rendering.key, "on_unreadable": config.on_unreadable} if rendering else {}),
        parents={"corpus": corpus, "tokenizer": tokenizer},
        make=make,
    )
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    if rendering is None:
        _require_row(config.row_tokens, int(artifact.facts["train"]["tokens"]))
    return artifact, reused


def _sample(splits: list[Documents]) -> Iterator[str]:
    """Documents spread evenly, about a hundredth of the text and at most 1 MiB, on which two encoders are compared."""
    for documents in splits:
        left = min(documents.n_bytes // 100, _SAMPLE_BYTES // len(splits)) + _SAMPLE_DOCUMENT
        for index in range(0, len(documents), max(1, len(documents) // 64)):
            size = int(documents.offsets[index + 1] - documents.offsets[index])
            if size <= min(left, _SAMPLE_DOCUMENT):
                left -= size
                yield documents.text(index)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Split:
    """The tokens of one split, memory-mapped: sequences one behind the other, cut into files."""

    folder: Path
    name: str
    files: tuple[np.ndarray, ...]
    """Tokens of each shard file, unsigned 16 or 32 bit."""
    offsets: np.ndarray
    """Where each sequence begins in the tokens, and the end; int64 [n_documents · segments + 1]."""
    document_bytes: np.ndarray
    """UTF-8 bytes of each document's text; int64 [n_documents]."""
    bos_id: int
    eos_id: int
    pad_id: int
    is_text: bool = True
    """Documents of text; otherwise rendered examples."""
    segments: int = 1
    """Sequences of each document, k."""
    codes: tuple[np.ndarray | None, ...] = ()
    """For each file the number of each target's weight, uint8; `None` or nothing: all weights are 1."""
    weights: tuple[np.ndarray | None, ...] = ()
    """For each file what these numbers stand for, float32."""
    labels: np.ndarray | None = None
    """Label of each document, int64 or float64 [n_documents]."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, begin and end of text included."""
        return int(self.offsets[-1])

    @property
    def n_documents(self) -> int:
        return (len(self.offsets) - 1) // self.segments

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.document_bytes.sum())

    @property
    def has_weights(self) -> bool:
        """Whether weights of targets are kept; otherwise all are 1."""
        return any(table is not None for table in self.weights)

    @property
    def weighs(self) -> bool:
        """Whether some target's weight is neither 0 nor 1."""
        return any(table is not None and not np.isin(table, (0, 1)).all() for table in self.weights)

    @cached_property
    def names(self) -> Names:
        """The documents' names, in order."""
        return open_names(self.folder, self.name)

    @cached_property
    def _starts(self) -> np.ndarray:
        return cumulated([len(file) for file in self.files])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to before `stop`; a view where they lie in one file."""
        pieces = [self.files[number][part] for number, part in self._pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.zeros(0, dtype=self.files[0].dtype)])

    def read_weights(self, start: int, stop: int) -> np.ndarray:
        """Weights of the tokens from `start` to before `stop` as targets, float32."""
        pieces = [np.zeros(0, dtype=np.float32)]
        for number, part in self._pieces(start, stop):
            codes, weights = (self.codes[number], self.weights[number]) if self.codes else (None, None)
            n = part.stop - part.start
            pieces.append(np.ones(n, dtype=np.float32) if codes is None or weights is None else weights[codes[part]])
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """Which part of which files holds the tokens from `start` to before `stop`."""
        pieces = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[number])
            end = min(stop, int(self._starts[number + 1]))
            if end > start:
                pieces.append((number, slice(start - first, end - first)))
            start, number = end, number + 1
        return pieces

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, begin and end of text included; all of its sequences."""
        first = index * self.segments
        return self.read(int(self.offsets[first]), int(self.offsets[first + self.segments]))


def open_split(folder: Path, split: str) -> Split:
    """The split `train` or `heldout` of the shards in `folder`."""
    index = read_json(folder / _INDEX)
    if split not in index:
        raise StoreError(f"{folder}: no shards of a split {split!r} are there")
    dtype = np.dtype(index["dtype"])
    paths = [folder / each["name"] for each in index[split]]
    tables = [each["weights"] for each in index[split]]
    labels = folder / f"{split}.labels.npy"
    return Split(
        folder=folder,
        name=split,
        files=tuple(map_file(path, dtype) for path in paths),
        offsets=map_array(folder / f"{split}.offsets.npy"),
        document_bytes=map_array(folder / f"{split}.bytes.npy"),
        bos_id=index["bos_id"],
        eos_id=index["eos_id"],
        pad_id=index["pad_id"],
        is_text=index["is_text"],
        segments=index["segments"],
        codes=tuple(
            None if table is None else map_file(path.with_suffix(".weights"), np.dtype(np.uint8))
            for path, table in zip(paths, tables, strict=True)
        ),
        weights=tuple(None if table is None else np.array(table, dtype=np.float32) for table in tables),
        labels=map_array(labels) if labels.is_file() else None,
    )


def map_array(path: Path) -> np.ndarray:
    """A `.npy` file, memory-mapped."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


# ---------------------------------------------------------------- writing


def _write_index(folder: Path, documents: Documents, parts: list[Part], segments: int) -> dict[str, Any]:
    split = documents.split
    dropped = {index: reason for part in parts for index, reason in part.dropped.items()}
    kept = np.ones(len(documents), dtype=np.bool_)
    kept[list(dropped)] = False
    sizes = np.diff(documents.offsets)
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(part.lengths for part in parts)])
    assert len(lengths) == segments * int(kept.sum()), "sequences were lost"
    np.save(folder / f"{split}.offsets.npy", cumulated(lengths))
    np.save(folder / f"{split}.bytes.npy", sizes[kept])
    write_names(folder, split, (documents.names[int(index)] for index in np.flatnonzero(kept)))
    if any(part.has_labels for part in parts):
        np.save(folder / f"{split}.labels.npy", np.concatenate([part.labels for part in parts if part.has_labels]))
    n_tokens, n_bytes = int(lengths.sum()), int(sizes[kept].sum())
    if not n_tokens:
        first = next(iter(dropped.values()), "there are no rows")
        raise DataError(f"data: no row of the split {split!r} can be rendered. The first: {first}")
    lost = {"documents": len(dropped), "bytes": documents.n_bytes - n_bytes, "examples": list(dropped.values())[:5]}
    return {
        "documents": int(kept.sum()),
        "tokens": n_tokens,
        "bytes": n_bytes,
        "bytes_per_token": n_bytes / n_tokens,
        "shards": len(parts),
    } | ({"dropped": lost} if dropped else {})


def _require_row(row_tokens: int, n_tokens: int) -> None:
    if n_tokens <= row_tokens:
        raise DataError(
            f"data.row_tokens={row_tokens}: the training text has {n_tokens} tokens, too few for one row (and the token "
            "that follows it).\nLower data.row_tokens, or add text."
        )
