"""Packing: whole examples into rows, so full that hardly a token of a row is wasted; and what to do where that cannot be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.schema import DataConfig
from kajiya.data.documents import SPLITS, cumulated
from kajiya.data.shards import Split, map_array, open_split
from kajiya.errors import ConfigError, DataError
from kajiya.run.code import code_revision
from kajiya.run.store import Artifact, Store, produce

STAGE = "packing"
PACKINGS = ("auto", "best_fit", "concatenate", "bucketed")


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items of these lengths (1 … capacity) into rows by best-fit-decreasing.

    Returns the items in the order of the rows, int64 [n], and where each row begins in it, int64 [rows + 1]; in a row they
    lie in rising order. Each item goes, longest first, where the least room is left that holds it (Johnson, 1974: at most
    11/9 of the best number of rows). Items of one length are interchangeable, so that whole groups are placed at a time:
    a million of them take a fraction of a second.
    """
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    assert lengths.min() > 0, "an item that fills nothing"
    assert lengths.max() <= capacity, "an item that fits into no row"
    items = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    row_of = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms(capacity)
    placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            rows, each = rooms.take(length, left)
            n = min(left, len(rows) * each)
            row_of[items[placed : placed + n]] = np.repeat(rows, each)[:n]
            placed, left = placed + n, left - n
            rooms.put(rows, n, length)
    return np.argsort(row_of, kind="stable"), cumulated(np.bincount(row_of, minlength=rooms.n_rows))


class _Rooms:
    """The rows begun, by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.n_rows = 0
        self._capacity = capacity
        self._by_room: dict[int, list[np.ndarray]] = {}
        # Bit r is set where a row has room r: the smallest room that holds a length is then one operation.
        self._mask = 0
        self._room = 0

    def take(self, length: int, n_items: int) -> tuple[np.ndarray, int]:
        """The rows of the smallest room that holds `length` (as many as the items need), and how many each holds."""
        fitting = self._mask >> length
        self._room = length + (fitting & -fitting).bit_length() - 1 if fitting else self._capacity
        each = self._room // length
        wanted = -(-n_items // each)
        if not fitting:
            self.n_rows += wanted
            return np.arange(self.n_rows - wanted, self.n_rows), each
        rows = np.concatenate(self._by_room.pop(self._room))
        self._mask ^= 1 << self._room
        if len(rows) > wanted:
            self._keep(rows[wanted:], self._room)
        return rows[:wanted], each

    def put(self, rows: np.ndarray, n_items: int, length: int) -> None:
        """Give the rows last taken back, filled one after the other with `n_items` of `length`."""
        each = self._room // length
        full, rest = divmod(n_items, each)
        if full:
            self._keep(rows[:full], self._room - each * length)
        if rest:
            self._keep(rows[full:], self._room - rest * length)

    def _keep(self, rows: np.ndarray, room: int) -> None:
        if room:
            self._by_room.setdefault(room, []).append(rows)
            self._mask |= 1 << room


# ---------------------------------------------------------------- which packing


@dataclass(frozen=True)
class ChosenPacking:
    """How sequences share rows, and why, in words."""

    name: str
    """best_fit, concatenate or bucketed."""
    why: str


def choose_packing(wanted: str, takes: str, is_text: bool, can_isolate: bool) -> ChosenPacking:
    """The packing that `data.packing` stands for; `takes` is what the loss takes, `can_isolate` is said of the model.

    Raises `ConfigError` for one that the rows or the model do not allow.
    """
    if takes == "seq2seq":
        if wanted not in ("auto", "bucketed"):
            raise ConfigError(
                "data.packing", f"{wanted}: the pairs of an encoder-decoder have a row each", "Set it to auto."
            )
        return ChosenPacking(
            "bucketed", "an encoder-decoder reads one pair a row; pairs of about one length go together"
        )
    if wanted == "best_fit" and not can_isolate:
        raise ConfigError(
            "data.packing",
            "best_fit puts several sequences in a row, and this model cannot keep them apart",
            "Set it to auto or bucketed.",
        )
    if wanted == "concatenate" and not is_text:
        raise ConfigError("data.packing", "concatenate cuts through examples, which stay whole", "Set it to auto.")
    if wanted != "auto":
        return ChosenPacking(wanted, "set in the config")
    if not can_isolate:
        return ChosenPacking(
            "bucketed", "this model cannot keep sequences of a row apart, so each has a row of its own"
        )
    if is_text:
        return ChosenPacking("concatenate", "text is cut where a row is full")
    return ChosenPacking("best_fit", "whole examples share rows and do not see each other")


# ---------------------------------------------------------------- the artifact


def build_packing(
    config: DataConfig, shards: Artifact, store: Store, answer_tokens: int | None = None
) -> tuple[Artifact, bool]:
    """Pack the examples of both splits into rows of `data.row_tokens`; returns the artifact, and whether it was there.

    Facts, for each split: `rows`, `examples`, `tokens`, `fill` (share of the rows' tokens that are used), and, but for text
    (whose longer documents are packed in pieces), what became of examples longer than a row, or with a sequence longer than
    `data.max_tokens`, as `data.on_long` says: `long`, `cut_examples`, `cut_tokens`, `dropped_examples`, `dropped_tokens`,
    `dropped_bytes`. With `answer_tokens` an example whose prompt leaves no room in a row for an answer of that length is too long
    as well, and cannot be cut. Raises `DataError` for a long example under `on_long=error`, and where no example is left.
    """

    def make(folder: Path) -> dict[str, Any]:
        return {name: _pack_split(config, open_split(shards.path, name), folder, answer_tokens) for name in SPLITS}

    return produce(
        store,
        STAGE,
        code=code_revision("kajiya.data.pack"),
        config={"row_tokens": config.row_tokens, "max_tokens": config.max_tokens, "on_long": config.on_long}
        | ({} if answer_tokens is None else {"answer_tokens": answer_tokens}),
        parents={"shards": shards},
        make=make,
    )


def _pack_split(config: DataConfig, split: Split, folder: Path, answer_tokens: int | None) -> dict[str, Any]:
    pieces = _pieces_of_text(split, config.row_tokens) if split.is_text else _examples(split, config, answer_tokens)
    if not len(pieces.documents):
        raise DataError(
            f"data.row_tokens={config.row_tokens}: of {split.n_documents} examples of the split {split.name!r} none fits "
            "into a row.\nRaise data.row_tokens, or set data.on_long=cut."
        )
    totals = pieces.lengths.sum(axis=1)
    order, rows = best_fit(totals, config.row_tokens)
    np.save(folder / f"{split.name}.examples.npy", pieces.documents[order])
    np.save(folder / f"{split.name}.rows.npy", rows)
    np.save(folder / f"{split.name}.starts.npy", pieces.starts[order])
    np.save(folder / f"{split.name}.lengths.npy", pieces.lengths[order])
    n_rows, n_tokens = len(rows) - 1, int(totals.sum())
    fill = n_tokens / (n_rows * config.row_tokens)
    return {"rows": n_rows, "examples": len(totals), "tokens": n_tokens, "fill": fill} | pieces.losses


@dataclass(frozen=True)
class _Pieces:
    """What is packed: an example's sequences together, or a piece of a text."""

    documents: np.ndarray
    """Document that each comes from; int64 [n]."""
    starts: np.ndarray
    """Where each of its sequences begins in the split's tokens; int64 [n, segments]."""
    lengths: np.ndarray
    """Tokens of each of its sequences; int64 [n, segments]."""
    losses: dict[str, int]


def _pieces_of_text(split: Split, room: int) -> _Pieces:
    """Documents, the longer ones in pieces; a piece begins with the last token of the one before, and none is lost."""
    lengths = np.diff(split.offsets)
    step = room - 1
    n_pieces = np.maximum(1, -(-(lengths - 1) // step))
    documents = np.repeat(np.arange(len(lengths)), n_pieces)
    number = np.arange(len(documents)) - np.repeat(cumulated(n_pieces)[:-1], n_pieces)
    kept = np.minimum(room, lengths[documents] - number * step)
    starts = split.offsets[:-1][documents] + number * step
    return _Pieces(documents, starts[:, None], kept[:, None], {})


def n_prompt_tokens(split: Split, document: int) -> int:
    """Tokens of a document before the first that is trained; of a prompt alone, all."""
    start, stop = split.offsets[document : document + 2].tolist()
    is_trained = split.read_weights(start, stop)[1:] > 0
    return 1 + int(np.argmax(is_trained)) if is_trained.any() else int(stop - start)


def _without_room(split: Split, config: DataConfig, answer_tokens: int | None) -> np.ndarray:
    """Whether the prompt of each example leaves no room for an answer; bool [n]."""
    if answer_tokens is None:
        return np.zeros(split.n_documents, dtype=bool)
    room = config.row_tokens - answer_tokens
    found = np.array([n_prompt_tokens(split, document) > room for document in range(split.n_documents)])
    if found.any() and config.on_long == "error":
        raise DataError(
            f"data.row_tokens={config.row_tokens}: {found.sum()} prompts of the split {split.name!r} leave no room "
            f"for the {answer_tokens} tokens of an answer (train.loss.options.max_tokens), the first of them "
            f"{split.names[int(found.argmax())]}.\nRaise data.row_tokens, or set data.on_long=drop, which leaves them out."
        )
    return found


def _examples(split: Split, config: DataConfig, answer_tokens: int | None) -> _Pieces:
    """Every example, those longer than they may be cut, dropped or refused as `data.on_long` says."""
    room = config.row_tokens
    limit = room if config.max_tokens is None else min(config.max_tokens, room)
    lengths = np.diff(split.offsets).reshape(-1, split.segments)
    totals = lengths.sum(axis=1)
    long = np.flatnonzero((totals > room) | (lengths > limit).any(axis=1))
    if len(long) and config.on_long == "error":
        worst = int(long[np.argmax(totals[long])])
        is_row = totals[worst] > room
        what = (
            f"{totals[worst]} tokens, more than a row of data.row_tokens={room}"
            if is_row
            else f"a sequence of {lengths[worst].max()} tokens, more than data.max_tokens={limit}"
        )
        raise DataError(
            f"{split.names[worst]}: {what} ({len(long)} of {len(totals)} examples are too long).\n"
            f"Raise data.{'row_tokens' if is_row else 'max_tokens'}, or set data.on_long to cut or drop."
        )
    is_full = _without_room(split, config, answer_tokens)
    kept = lengths * ~is_full[:, None]
    for index in np.setdiff1d(long, np.flatnonzero(is_full)).tolist():
        kept[index] = cut_to(np.minimum(lengths[index], limit), room) if config.on_long == "cut" else 0
        if not _has_target(split, index, kept[index]):
            kept[index] = 0
    left = kept.sum(axis=1)
    is_dropped = left == 0
    losses = {
        "long": len(np.union1d(long, np.flatnonzero(is_full))),
        "cut_examples": int(((left < totals) & ~is_dropped).sum()),
        "cut_tokens": int((totals - left)[~is_dropped].sum()),
        "dropped_examples": int(is_dropped.sum()),
        "dropped_tokens": int(totals[is_dropped].sum()),
        "dropped_bytes": int(split.document_bytes[is_dropped].sum()),
    }
    if answer_tokens is not None:
        losses["answer_tokens"] = answer_tokens
    stay = np.flatnonzero(~is_dropped)
    starts = split.offsets[:-1].reshape(-1, split.segments)
    return _Pieces(stay, starts[stay], kept[stay], losses)


def cut_to(lengths: np.ndarray, room: int) -> np.ndarray:
    """Lengths that together fill the room: no sequence is cut to less than its fair share, and each keeps its beginning."""
    kept = np.zeros_like(lengths)
    left = room
    for n_done, index in enumerate(np.argsort(lengths, kind="stable").tolist()):
        kept[index] = min(int(lengths[index]), left // (len(lengths) - n_done))
        left -= int(kept[index])
    return kept


def _has_target(split: Split, example: int, kept: np.ndarray) -> bool:
    """Whether every sequence of the example still has a target after the cut, where it had one before."""
    for number, n in enumerate(kept.tolist()):
        start, stop = split.offsets[example * split.segments + number :][:2].tolist()
        weights = split.read_weights(start, stop)
        if weights[1:].any() and not weights[1:n].any():
            return False
    return True


@dataclass(frozen=True)
class Packing:
    """The rows of one split, memory-mapped."""

    examples: np.ndarray
    """Documents (examples) in the order of the rows; int64 [n]."""
    rows: np.ndarray
    """Where each row begins in `examples`, and the end; int64 [rows + 1]."""
    lengths: np.ndarray
    """Tokens of each sequence, in the order of `examples`; int64 [n, segments]."""
    starts: np.ndarray
    """Where each sequence begins in the split's tokens; int64 [n, segments]."""


def open_packing(folder: Path, split: str) -> Packing:
    """The packing of a split from the artifact's folder."""
    return Packing(*(map_array(folder / f"{split}.{name}.npy") for name in ("examples", "rows", "lengths", "starts")))
