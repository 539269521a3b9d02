"""Cleaning of the training side: what is empty, doubled, or too near to the held-out side leaves it, for a reason."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kajiya.config.schema import DataConfig
from kajiya.data.contamination import HeldoutSequences
from kajiya.data.digests import Digests, digest_of
from kajiya.data.documents import Documents, close_up
from kajiya.data.duplicates import FEW_LINES, LineIndex
from kajiya.data.ledger import CONTAMINATED, DUPLICATE, EMPTY, CorpusLedger
from kajiya.data.memory import room_bytes
from kajiya.data.minhash import NearDuplicates
from kajiya.data.postings import NoRoomError
from kajiya.data.shingles import plain_text
from kajiya.errors import DataError

NOTHING = "nothing in it"
DUPLICATE_OF_HELDOUT = "duplicate of a held-out document"
NEAR_DUPLICATE_OF_HELDOUT = "near-duplicate of a held-out document"
SHARES_SEQUENCES = "shares word sequences with a held-out document"
DUPLICATE_IN_TRAIN = "duplicate of another training document"
NEAR_DUPLICATE_IN_TRAIN = "near-duplicate of another training document"

_ONE_ROW_BYTES = 2**25
"""Kept free beside the indices: for a row that is compared, and for the words whose hashes are kept."""


@dataclass(frozen=True)
class Left:
    """Why a row leaves the training side."""

    kind: str
    """As the ledger has it."""
    reason: str
    example: str
    """The row and what it is like, in words."""


class Rule(Protocol):
    """A reason to leave; asked of one row after another, in order."""

    def find(self, index: int, raw: bytes) -> Left | None:
        """Why the row of that index leaves, or `None`."""
        ...

    def keep(self, index: int, raw: bytes) -> None:
        """No rule spoke against the row: it stays."""
        ...


def clean(
    config: DataConfig, train: Documents, heldout: Documents, is_text: bool, ledger: CorpusLedger
) -> dict[str, int]:
    """Take out of the training files what the config's rules say; every row is counted.

    Returns what was not done to the end: `compared_in_part`, rows that were compared with some of the likely ones alone.
    """
    stays = np.zeros(len(train), dtype=np.bool_)
    with _rules(config, train, heldout, is_text) as rules:
        for index in range(len(train)):
            raw = train.read(index)
            left = next((found for rule in rules if (found := rule.find(index, raw)) is not None), None)
            if left is not None:
                ledger.drop(left.kind, left.reason, len(raw), left.example)
                continue
            for rule in rules:
                rule.keep(index, raw)
            stays[index] = True
            ledger.train.add(len(raw))
        n_limited = sum(rule.n_limited for rule in rules if isinstance(rule, _Similar))
    close_up(train, stays)
    return {"compared_in_part": n_limited} if n_limited else {}


@contextmanager
def _rules(config: DataConfig, train: Documents, heldout: Documents, is_text: bool) -> Iterator[Sequence[Rule]]:
    rules: list[Rule] = [_Exact(train, heldout, removes_doubles=config.duplicates != "off")]
    if config.near_duplicate is not None:
        # A structured row, or a passage of a file, has few lines: one that many share must not make them alike.
        is_long = is_text and not (config.source.name == "text" and config.source.options.get("split_on"))
        few_lines = 0 if is_long else FEW_LINES
        with _in_memory(config, "near_duplicate") as most_bytes:
            rules.append(_Lines(config.near_duplicate, train, heldout, is_text, few_lines, most_bytes))
    if (n_words := config.contamination_words) is not None:
        with _in_memory(config, "contamination_words") as most_bytes:
            rules.append(_Sequences(n_words, config.contamination_share, train, heldout, is_text, most_bytes))
    if config.duplicates != "minhash":
        yield rules
        return
    similar = _Similar(config, train, heldout, is_text, train.folder)
    try:
        yield [*rules, similar]
    finally:
        similar.close()


@contextmanager
def _in_memory(config: DataConfig, name: str) -> Iterator[int]:
    """The memory that an index of the held-out side may take, bytes; that it would take more is said with the setting's name."""
    most_bytes = room_bytes(config.memory_mib) - _ONE_ROW_BYTES
    try:
        yield most_bytes
    except NoRoomError as error:
        raise DataError(
            f"data.{name}={getattr(config, name)}: an index of the held-out rows takes more than the "
            f"{max(0, most_bytes) / 2**20:,.0f} MiB of memory that data.memory_mib={config.memory_mib} leaves.\n"
            f"Raise data.memory_mib, hold out less, or set data.{name}=null."
        ) from error


class _Exact:
    """Rows without content, and rows whose bytes another one has."""

    def __init__(self, train: Documents, heldout: Documents, removes_doubles: bool) -> None:
        self._train, self._heldout = train, heldout
        self._removes_doubles = removes_doubles
        self._held, self._seen = Digests(), Digests()
        self._found = (-1, b"")
        """The row that was looked at last, and its digest: it may be kept next."""
        for index in range(len(heldout)):
            digest = digest_of(heldout.read(index))
            if self._held.first(digest) is None:
                self._held.add(digest, index)

    def find(self, index: int, raw: bytes) -> Left | None:
        name = self._train.names[index]
        if not raw:
            return Left(EMPTY, NOTHING, name)
        content = digest_of(raw)
        self._found = index, content
        if (held := self._held.first(content)) is not None:
            return Left(CONTAMINATED, DUPLICATE_OF_HELDOUT, f"{name} is {self._heldout.names[held]}")
        if (twin := self._seen.first(content)) is not None:
            return Left(DUPLICATE, DUPLICATE_IN_TRAIN, f"{name} is {self._train.names[twin]}")
        return None

    def keep(self, index: int, raw: bytes) -> None:
        if self._removes_doubles:
            found, content = self._found
            assert found == index, "a row is kept when it has been looked at"
            self._seen.add(content, index)


class _Lines:
    """Rows that share their lines with a held-out one."""

    def __init__(
        self, at_least: float, train: Documents, heldout: Documents, is_text: bool, few_lines: int, most_bytes: int
    ) -> None:
        self._at_least = at_least
        self._train, self._heldout = train, heldout
        self._is_text = is_text
        self._index = LineIndex(_texts(heldout, is_text), few_lines, most_bytes)

    def find(self, index: int, raw: bytes) -> Left | None:
        match = self._index.nearest(plain_text(raw, self._is_text), self._at_least)
        if match is None:
            return None
        shares = f"shares {match.share:.0%} of its lines with {self._heldout.names[match.index]}"
        return Left(CONTAMINATED, NEAR_DUPLICATE_OF_HELDOUT, f"{self._train.names[index]} {shares}")

    def keep(self, index: int, raw: bytes) -> None:
        """Nothing to remember: the held-out side is fixed."""


class _Sequences:
    """Rows that hold word sequences of a held-out one."""

    def __init__(
        self, n_words: int, more_than: float, train: Documents, heldout: Documents, is_text: bool, most_bytes: int
    ) -> None:
        self._n_words, self._more_than = n_words, more_than
        self._train, self._heldout = train, heldout
        self._is_text = is_text
        self._sequences = HeldoutSequences(_texts(heldout, is_text), n_words, most_bytes)

    def find(self, index: int, raw: bytes) -> Left | None:
        match = self._sequences.nearest(plain_text(raw, self._is_text), self._more_than)
        if match is None:
            return None
        held = self._heldout.names[match.index]
        words = f"{self._train.names[index]} holds {match.share:.1%} of the {self._n_words}-word sequences of {held}"
        return Left(CONTAMINATED, SHARES_SEQUENCES, words)

    def keep(self, index: int, raw: bytes) -> None:
        """Nothing to remember: the held-out side is fixed."""


class _Similar:
    """Rows that are nearly an earlier training row, or a held-out one. Held-out rows are numbered before the others."""

    def __init__(self, config: DataConfig, train: Documents, heldout: Documents, is_text: bool, folder: Path) -> None:
        self._train, self._heldout = train, heldout

        def text(index: int) -> str:
            held = index < len(heldout)
            raw = heldout.read(index) if held else train.read(index - len(heldout))
            return plain_text(raw, is_text)

        self._near = NearDuplicates(
            text,
            len(heldout) + len(train),
            threshold=config.minhash_similarity,
            n_words=config.minhash_words,
            folder=folder,
        )
        for index in range(len(heldout)):
            self._near.keep(index)

    def find(self, index: int, raw: bytes) -> Left | None:
        match = self._near.nearest(len(self._heldout) + index)
        if match is None:
            return None
        name, is_held = self._train.names[index], match.index < len(self._heldout)
        other = self._heldout.names[match.index] if is_held else self._train.names[match.index - len(self._heldout)]
        kind, reason = (CONTAMINATED, NEAR_DUPLICATE_OF_HELDOUT) if is_held else (DUPLICATE, NEAR_DUPLICATE_IN_TRAIN)
        return Left(kind, reason, f"{name} is to {match.share:.0%} {other}")

    def keep(self, index: int, raw: bytes) -> None:
        self._near.keep(len(self._heldout) + index)

    @property
    def n_limited(self) -> int:
        """Rows that were compared with some of the likely ones alone."""
        return self._near.n_limited

    def close(self) -> None:
        """Delete the working files."""
        self._near.close()


def _texts(documents: Documents, is_text: bool) -> Iterator[str]:
    return (plain_text(documents.read(index), is_text) for index in range(len(documents)))
