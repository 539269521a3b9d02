"""Batches as a person reads them: each row's sequences, token by token, with what is trained."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, Seq2SeqBatch
from kajiya.data.ledger import DataLedger
from kajiya.serving.text import byte_reader


@dataclass(frozen=True)
class Piece:
    """A token."""

    id: int
    text: str
    """What it adds to the text; nothing where its character ends in a later token."""
    weight: float = 0.0
    """Weight of this token as a target; 0: it is context."""
    is_special: bool = False
    hidden: str | None = None
    """Of a masked row: the token that is to be found here."""


@dataclass(frozen=True)
class Strand:
    """A sequence, whose tokens see each other alone."""

    title: str
    pieces: tuple[Piece, ...]

    @property
    def n_targets(self) -> int:
        """Tokens that are trained."""
        return sum(piece.weight > 0 for piece in self.pieces)


@dataclass(frozen=True)
class Shown:
    """A row of a batch."""

    number: int
    groups: tuple[tuple[Strand, ...], ...]
    """Sequences that belong together (chosen and rejected, input and target) in one group; else one a group."""
    n_filled: int = 0
    """Tokens that only fill the row up."""

    @property
    def strands(self) -> list[Strand]:
        """All sequences, in order."""
        return [strand for group in self.groups for strand in group]

    @property
    def n_targets(self) -> int:
        """Tokens that are trained."""
        return sum(strand.n_targets for strand in self.strands)

    @property
    def n_tokens(self) -> int:
        """Tokens, those that fill up left out."""
        return sum(len(strand.pieces) for strand in self.strands)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        counts = {"tokens": self.n_tokens, "targets": self.n_targets, "filled": self.n_filled}
        return (
            {"row": self.number} | counts | {"groups": [[asdict(strand) for strand in group] for group in self.groups]}
        )


@dataclass(frozen=True)
class Preview:
    """Some rows of a split, and the ledger of all."""

    title: str
    """Name of the recipe."""
    words: tuple[str, ...]
    """What it is, in a few lines."""
    split: str
    rows: tuple[Shown, ...]
    ledger: DataLedger

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "recipe": self.title,
            "split": self.split,
            "rows": [row.facts() for row in self.rows],
            "ledger": self.ledger.facts(),
        }


class Reader:
    """Turns token ids into what they say."""

    def __init__(self, tokenizer: Any, is_masked: bool = False) -> None:
        """`is_masked`: a target stands in its own place, beneath what hides it, and not before its token."""
        self.is_masked = is_masked
        self._bytes = byte_reader(tokenizer)
        self._special = set(tokenizer.all_special_ids)

    def pieces(self, ids: Sequence[int], weights: Sequence[float], hidden: Sequence[int] | None = None) -> list[Piece]:
        """The tokens of one sequence. A character whose bytes are spread over tokens stands at the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        found = []
        for place, (token, weight) in enumerate(zip(ids, weights, strict=True)):
            ends = place == len(ids) - 1 or token in self._special
            text = decoder.decode(self._bytes(token), final=ends)
            beneath = None if hidden is None or hidden[place] == NO_TARGET else self.word(hidden[place])
            found.append(Piece(int(token), text, float(weight), token in self._special, beneath))
        return found

    def word(self, token: int) -> str:
        """One token by itself."""
        return self._bytes(token).decode(errors="replace")


def shown_rows(batch: Any, reader: Reader, first: int, names: Sequence[str]) -> list[Shown]:
    """The rows of a batch of any kind, the first with the number `first`; `names` are of its documents, in order."""
    for kind, show in _KINDS:
        if isinstance(batch, kind):
            return list(show(batch, reader, first, names))
    raise AssertionError(f"no preview of {type(batch).__name__}")


# ---------------------------------------------------------------- each kind of batch


def _tokens(batch: Batch, reader: Reader, first: int, names: Sequence[str]) -> Iterator[Shown]:
    for row in range(len(batch.tokens)):
        spans, n_filled = _spans(batch, row)
        # What fills the row up is no sequence of a document.
        spans = spans if n_filled == 0 else spans[:-1]
        groups = tuple(
            (Strand(names[place] if place < len(names) else "", tuple(_pieces(batch, reader, row, *span))),)
            for place, span in enumerate(spans)
        )
        yield Shown(first + row, groups, n_filled)


def _spans(batch: Batch, row: int) -> tuple[list[tuple[int, int]], int]:
    """Where each segment of a row begins and ends, and how many tokens of the last one only fill the row up."""
    segments = batch.segments[row]
    ends = (torch.nonzero(segments[1:] != segments[:-1]).flatten() + 1).tolist()
    spans = list(zip([0, *ends], [*ends, len(segments)], strict=True))
    start, stop = spans[-1]
    tokens = batch.tokens[row, start:stop]
    is_filling = (
        len(spans) > 1 and bool((tokens == tokens[0]).all()) and bool((batch.targets[row, start:] == NO_TARGET).all())
    )
    return spans, stop - start if is_filling else 0


def _pieces(batch: Batch, reader: Reader, row: int, start: int, stop: int) -> list[Piece]:
    """The tokens of a segment, and behind a row's last one the target that is the next row's first token."""
    targets = batch.targets[row, start:stop]
    weights = (targets != NO_TARGET).float() if batch.weights is None else batch.weights[row, start:stop]
    weights = torch.where(targets == NO_TARGET, torch.zeros(()), weights)
    ids = batch.tokens[row, start:stop].tolist()
    if reader.is_masked:
        return reader.pieces(ids, weights.tolist(), targets.tolist())
    said = [0.0, *weights.tolist()]
    if targets[-1] != NO_TARGET:
        return reader.pieces([*ids, int(targets[-1])], said)
    return reader.pieces(ids, said[:-1])


def _examples(batch: ExampleBatch, reader: Reader, first: int, names: Sequence[str]) -> Iterator[Shown]:
    k = len(batch.last) // max(1, len(batch.examples))
    roles = ("chosen", "rejected") if k == 2 else ("",)
    in_rows: dict[int, list[int]] = {}
    width = batch.rows.tokens.shape[1]
    for example in range(len(batch.examples)):
        in_rows.setdefault(int(batch.last[example * k]) // width, []).append(example)
    for number, (row, examples) in enumerate(sorted(in_rows.items())):
        groups = []
        for example in examples:
            name = names[example] if example < len(names) else f"example {int(batch.examples[example])}"
            value = None if batch.labels is None else batch.labels[example].item()
            label = "" if value is None or (k == 2 and not value) else f" · {'margin' if k == 2 else 'label'} {value:g}"
            strands = []
            for j, role in enumerate(roles):
                at_row, span = _sequence(batch, example * k + j)
                title = f"{name}{label}" + (f" · {role}" if role else "")
                strands.append(Strand(title, tuple(_pieces(batch.rows, reader, at_row, *span))))
            groups.append(tuple(strands))
        n_filled = int((batch.owner[row] < 0).sum())
        yield Shown(first + number, tuple(groups), n_filled)


def _sequence(batch: ExampleBatch, sequence: int) -> tuple[int, tuple[int, int]]:
    """Row of a sequence, and where in it the sequence begins and ends."""
    row, last = divmod(int(batch.last[sequence]), batch.owner.shape[1])
    n = int((batch.owner[row] == sequence).sum())
    return row, (last - n + 1, last + 1)


def _pairs(batch: Seq2SeqBatch, reader: Reader, first: int, names: Sequence[str]) -> Iterator[Shown]:
    for row in range(len(batch.inputs)):
        mask = batch.inputs_mask[row]
        read = batch.inputs[row][mask].tolist()
        said = batch.targets[row]
        # A target without weight is read all the same: it is what the decoder sees in the next place.
        ids = torch.where(said == NO_TARGET, torch.roll(batch.tokens[row], -1), said)
        stop = int(torch.nonzero(said != NO_TARGET).max()) + 1 if bool((said != NO_TARGET).any()) else 0
        name = names[row] if row < len(names) else ""
        strands = (
            Strand(f"{name} · input".removeprefix(" · "), tuple(reader.pieces(read, [0.0] * len(read)))),
            Strand("target", tuple(reader.pieces(ids[:stop].tolist(), (said[:stop] != NO_TARGET).float().tolist()))),
        )
        yield Shown(first + row, (strands,), int((~mask).sum()) + len(said) - stop)


_KINDS: tuple[tuple[type, Callable[[Any, Reader, int, Sequence[str]], Iterator[Shown]]], ...] = (
    (ExampleBatch, _examples),
    (Seq2SeqBatch, _pairs),
    (Batch, _tokens),
)
