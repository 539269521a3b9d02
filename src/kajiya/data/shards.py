"""Shards: every document tokenized once, as memory-mapped integers with the documents' boundaries."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.schema import DataConfig
from kajiya.data.documents import SPLITS, Documents, cumulated, map_file, open_documents
from kajiya.data.encode import encode_texts, open_encoder
from kajiya.data.progress import OnEvent, Progress, silent
from kajiya.errors import DataError, StoreError
from kajiya.run.code import code_revision
from kajiya.run.files import read_json, require_space, write_json
from kajiya.run.store import Artifact, Store, produce

STAGE = "shards"
_INDEX = "shards.json"
_BATCH_BYTES = 4 * 2**20


def build_shards(
    config: DataConfig, corpus: Artifact, tokenizer: Artifact, store: Store, on_event: OnEvent = silent
) -> tuple[Artifact, bool]:
    """Tokenize both splits; returns the artifact, and whether it was there already.

    Each document becomes begin-of-text + ids + end-of-text. Facts, for each split: `documents`, `tokens`, `bytes`,
    `bytes_per_token`, `shards`. `row_tokens` is no part of the key; a corpus shorter than one row raises `DataError`.
    """
    special = (int(tokenizer.facts["bos_id"]), int(tokenizer.facts["eos_id"]))
    dtype = "<u2" if tokenizer.facts["vocab_size"] <= 2**16 else "<u4"

    def make(folder: Path) -> dict[str, Any]:
        encoder = open_encoder(tokenizer.path)
        splits = {split: open_documents(corpus.path, split) for split in SPLITS}
        n_bytes = sum(documents.n_bytes for documents in splits.values())
        require_space(folder, n_bytes * np.dtype(dtype).itemsize, "tokenizing")
        progress = Progress(on_event, STAGE, "bytes", n_bytes)
        facts: dict[str, Any] = {}
        for split, documents in splits.items():
            with _ShardWriter(folder, split, np.dtype(dtype), config.shard_tokens) as writer:
                lengths = _tokenize(documents, encoder, special, writer, progress)
            facts[split] = _write_index(folder, split, documents, lengths) | {"shards": writer.n_files}
        progress.end()
        index = {"dtype": dtype, "shard_tokens": config.shard_tokens, "bos_id": special[0], "eos_id": special[1]}
        write_json(folder / _INDEX, index)
        return facts | index

    artifact, reused = produce(
        store,
        STAGE,
        code=code_revision("kajiya.data.shards"),
        config={"shard_tokens": config.shard_tokens},
        parents={"corpus": corpus, "tokenizer": tokenizer},
        make=make,
    )
    _require_row(config.row_tokens, int(artifact.facts["train"]["tokens"]))
    return artifact, reused


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Split:
    """The tokens of one split, memory-mapped: documents one behind the other, cut into files of equal length."""

    folder: Path
    name: str
    files: tuple[np.ndarray, ...]
    """Tokens of each shard file, unsigned 16 or 32 bit."""
    shard_tokens: int
    """Tokens in each file but the last."""
    offsets: np.ndarray
    """Where each document begins in the tokens, and the end; int64 [n_documents + 1]."""
    document_bytes: np.ndarray
    """UTF-8 bytes of each document's text; int64 [n_documents]."""
    bos_id: int
    eos_id: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents, begin and end of text included."""
        return int(self.offsets[-1])

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.document_bytes.sum())

    @cached_property
    def names(self) -> list[str]:
        """The documents' names, in order."""
        names: list[str] = json.loads((self.folder / f"{self.name}.names.json").read_bytes())
        return names

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to before `stop`; a view where they lie in one file."""
        pieces = []
        for number in range(start // self.shard_tokens, -(-stop // self.shard_tokens)):
            first = number * self.shard_tokens
            pieces.append(self.files[number][max(0, start - first) : stop - first])
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.zeros(0, dtype=self.files[0].dtype)])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, begin and end of text included."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))


def open_split(folder: Path, split: str) -> Split:
    """The split `train` or `heldout` of the shards in `folder`."""
    index = read_json(folder / _INDEX)
    paths = sorted(folder.glob(f"{split}-*.bin"))
    if not paths:
        raise StoreError(f"{folder}: no shards of a split {split!r} are there")
    return Split(
        folder=folder,
        name=split,
        files=tuple(map_file(path, np.dtype(index["dtype"])) for path in paths),
        shard_tokens=index["shard_tokens"],
        offsets=map_array(folder / f"{split}.offsets.npy"),
        document_bytes=map_array(folder / f"{split}.bytes.npy"),
        bos_id=index["bos_id"],
        eos_id=index["eos_id"],
    )


def map_array(path: Path) -> np.ndarray:
    """A `.npy` file, memory-mapped."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


# ---------------------------------------------------------------- writing


class _ShardWriter:
    """Writes a stream of tokens into files of exactly `shard_tokens`, the last one shorter."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self.n_files = 0
        self._space = 0
        self._open_next()

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens, int64 [n]."""
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            if not self._space:
                self._handle.close()
                self._open_next()
            part, tokens = tokens[: self._space], tokens[self._space :]
            self._handle.write(part.tobytes())
            self._space -= len(part)

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def _open_next(self) -> None:
        # Nine digits, so that sorting the names sorts the files.
        self._handle = (self._folder / f"{self._split}-{self.n_files:09d}.bin").open("wb")
        self.n_files += 1
        self._space = self._shard_tokens


def _tokenize(
    documents: Documents, encoder: Any, special: tuple[int, int], writer: _ShardWriter, progress: Progress
) -> list[int]:
    """Write every document's tokens; returns their numbers. Memory holds one batch of documents."""
    bos, eos = np.array(special[:1]), np.array(special[1:])
    lengths: list[int] = []
    for first, texts in documents.batches(_BATCH_BYTES):
        encoded = encode_texts(encoder, texts)
        for index, ids in enumerate(encoded, start=first):
            if np.isin(ids, special).any():
                raise DataError(
                    f"{documents.names[index]}: its text is encoded to the special token {special[0]} or {special[1]}, "
                    "which marks where documents begin and end.\nChoose another tokenizer, or train one."
                )
            lengths.append(len(ids) + 2)
        writer.add(np.concatenate([part for ids in encoded for part in (bos, ids, eos)]))
        progress.add(int(documents.offsets[first + len(texts)] - documents.offsets[first]))
    return lengths


def _write_index(folder: Path, split: str, documents: Documents, lengths: list[int]) -> dict[str, Any]:
    np.save(folder / f"{split}.offsets.npy", cumulated(lengths))
    np.save(folder / f"{split}.bytes.npy", np.diff(documents.offsets))
    (folder / f"{split}.names.json").write_text(json.dumps(documents.names), encoding="utf-8")
    n_tokens = sum(lengths)
    return {
        "documents": len(documents),
        "tokens": n_tokens,
        "bytes": documents.n_bytes,
        "bytes_per_token": documents.n_bytes / n_tokens,
    }


def _require_row(row_tokens: int, n_tokens: int) -> None:
    if n_tokens <= row_tokens:
        raise DataError(
            f"data.row_tokens={row_tokens}: the training text has {n_tokens} tokens, too few for one row (and the token "
            "that follows it).\nLower data.row_tokens, or add text."
        )
