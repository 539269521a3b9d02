"""The corpus: a source read once, split, cleaned of what the held-out side also holds; every document accounted for."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kajiya.config.schema import DataConfig
from kajiya.config.tables import TABLES
from kajiya.data.documents import Documents, DocumentWriter, open_documents, write_index
from kajiya.data.duplicates import LineIndex
from kajiya.data.entries import Unreadable
from kajiya.data.origin import EntriesDigest, Origin, open_source
from kajiya.data.progress import OnEvent, Progress, silent
from kajiya.errors import DataError
from kajiya.run.code import code_revision
from kajiya.run.store import Artifact, Store, produce

STAGE = "corpus"
UNREADABLE = "unreadable"
EMPTY = "empty"
DUPLICATE_OF_HELDOUT = "duplicate of a held-out document"
NEAR_DUPLICATE_OF_HELDOUT = "near-duplicate of a held-out document"
DUPLICATE_IN_TRAIN = "duplicate of another training document"
_N_EXAMPLES = 5


def build_corpus(config: DataConfig, store: Store, on_event: OnEvent = silent) -> tuple[Artifact, bool]:
    """Read, split and deduplicate the source; returns the artifact, and whether it was there already.

    The artifact's folder holds the splits `train` and `heldout` (`kajiya.data.documents`); its fact `ledger` says what
    became of every document. Raises `DataError` for an unreadable document (unless `on_unreadable` is `drop`), for a
    source without documents, and for a split that stays empty.
    """
    origin = open_source(config.source)
    fingerprint = origin.fingerprint()

    def make(folder: Path) -> dict[str, Any]:
        entries = EntriesDigest()
        facts = _write(config, replace(origin, read=lambda: entries.follow(origin.read())), folder, on_event)
        # What a user's own function yields was hashed in passing, so that it is not called once more.
        if (entries.hexdigest() if origin.is_own else origin.fingerprint()) != fingerprint:
            raise DataError(
                "data.source: its content changed while it was read, or differs from one reading to the next.\n"
                "Run it again when nothing writes to it; a source of your own must yield the same documents each time."
            )
        return facts

    return produce(
        store,
        STAGE,
        code=code_revision("kajiya.data.corpus", *source_modules(config.source.name)),
        config={
            "source": origin.settings,
            "content": fingerprint,
            "heldout_every": config.heldout_every,
            "near_duplicate": config.near_duplicate,
            "on_unreadable": config.on_unreadable,
        },
        parents={},
        make=make,
    )


def source_modules(*names: str) -> list[str]:
    """The modules of the sources of those names; of a user's own function its content alone counts, so it has none."""
    return sorted({TABLES["source"][name].target.partition(":")[0] for name in names if ":" not in name})


def is_heldout(name: str, heldout_every: int) -> bool:
    """Whether the document of that name is held out: one in `heldout_every`, by a hash of the name alone."""
    return int(hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest(), 16) % heldout_every == 0


# ---------------------------------------------------------------- the ledger


@dataclass
class Tally:
    """Documents and their bytes, with a few names."""

    documents: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, n_bytes: int, example: str | None = None) -> None:
        """Count one document."""
        self.documents += 1
        self.bytes += n_bytes
        if example is not None and len(self.examples) < _N_EXAMPLES:
            self.examples.append(example)

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        counts: dict[str, Any] = {"documents": self.documents, "bytes": self.bytes}
        return counts | {"examples": self.examples} if self.examples else counts


@dataclass
class Ledger:
    """What entered and what became of it."""

    entered: Tally = field(default_factory=Tally)
    train: Tally = field(default_factory=Tally)
    heldout: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)

    def drop(self, reason: str, n_bytes: int, example: str) -> None:
        """Count a document that is left out."""
        self.dropped.setdefault(reason, Tally()).add(n_bytes, example)

    def facts(self) -> dict[str, Any]:
        """As it stands in a manifest: `entered`, `train`, `heldout`, `dropped` by reason. It must add up."""
        parts = [self.train, self.heldout, *self.dropped.values()]
        assert self.entered.documents == sum(part.documents for part in parts), "the ledger does not add up"
        assert self.entered.bytes == sum(part.bytes for part in parts), "the ledger does not add up"
        return {
            "entered": self.entered.facts(),
            "train": self.train.facts(),
            "heldout": self.heldout.facts(),
            "dropped": {reason: tally.facts() for reason, tally in sorted(self.dropped.items())},
        }


# ---------------------------------------------------------------- reading and cleaning


def _write(config: DataConfig, origin: Origin, folder: Path, on_event: OnEvent) -> dict[str, Any]:
    ledger = Ledger()
    train, heldout = _read(config, origin, folder, ledger, Progress(on_event, STAGE, "bytes"))
    _clean(train, heldout, config.near_duplicate, ledger)
    kept = open_documents(folder, "train")
    assert (len(kept), kept.n_bytes) == (ledger.train.documents, ledger.train.bytes), "not what the ledger says"
    assert (len(heldout), heldout.n_bytes) == (ledger.heldout.documents, ledger.heldout.bytes), "not what it says"
    _require_documents(config, ledger)
    return {"source": origin.facts, "heldout_every": config.heldout_every, "ledger": ledger.facts()}


def _read(
    config: DataConfig, origin: Origin, folder: Path, ledger: Ledger, progress: Progress
) -> tuple[Documents, Documents]:
    """Write every readable document to its side; the training side is not yet cleaned."""
    with DocumentWriter(folder, "train") as train, DocumentWriter(folder, "heldout") as heldout:
        for entry in origin.read():
            ledger.entered.add(entry.n_bytes)
            progress.add(entry.n_bytes)
            if isinstance(entry, Unreadable):
                if config.on_unreadable == "error":
                    raise DataError(
                        f"{entry.name}: {entry.reason}\n"
                        "Mend or remove it, or set data.on_unreadable=drop to leave such documents out, counted."
                    )
                ledger.drop(UNREADABLE, entry.n_bytes, f"{entry.name}: {entry.reason}")
            elif is_heldout(entry.group or entry.name, config.heldout_every):
                heldout.add(entry.name, entry.text.encode())
                ledger.heldout.add(entry.n_bytes)
            else:
                train.add(entry.name, entry.text.encode())
        progress.end()
        return train.finish(), heldout.finish()


def _clean(train: Documents, heldout: Documents, near_duplicate: float | None, ledger: Ledger) -> None:
    """Leave out of the training files what is empty, doubled, or too near to a held-out document.

    The file is closed up in place, so that no second copy of the corpus is ever on the disk.
    """
    held = {hashlib.sha256(heldout.read(index)).digest(): index for index in reversed(range(len(heldout)))}
    lines = LineIndex(heldout.texts()) if near_duplicate is not None else None
    seen: dict[bytes, int] = {}
    names: list[str] = []
    lengths: list[int] = []
    with (train.folder / "train.bin").open("r+b") as handle:
        for index, name in enumerate(train.names):
            raw = train.read(index)
            content = hashlib.sha256(raw).digest()
            if not raw:
                ledger.drop(EMPTY, 0, name)
            elif content in held:
                ledger.drop(DUPLICATE_OF_HELDOUT, len(raw), f"{name} is {heldout.names[held[content]]}")
            elif content in seen:
                ledger.drop(DUPLICATE_IN_TRAIN, len(raw), f"{name} is {train.names[seen[content]]}")
            else:
                match = lines.nearest(raw.decode(), near_duplicate) if lines and near_duplicate else None
                if match is not None:
                    example = f"{name} shares {match.share:.0%} of its lines with {heldout.names[match.index]}"
                    ledger.drop(NEAR_DUPLICATE_OF_HELDOUT, len(raw), example)
                    continue
                seen[content] = index
                handle.write(raw)
                names.append(name)
                lengths.append(len(raw))
                ledger.train.add(len(raw))
        handle.truncate()
    write_index(train.folder, "train", names, lengths)


def _require_documents(config: DataConfig, ledger: Ledger) -> None:
    n_entered = ledger.entered.documents
    dropped = "; ".join(f"{tally.documents} {reason}" for reason, tally in sorted(ledger.dropped.items()))
    if n_entered == 0:
        raise DataError("data.source: it holds no documents.\nCheck data.source.options.")
    examples = [example for tally in ledger.dropped.values() for example in tally.examples[:1]]
    hint = f" Dropped: {dropped} (for example {examples[0]})." if examples else ""
    if ledger.heldout.documents == 0:
        raise DataError(
            f"data.heldout_every={config.heldout_every}: of {n_entered} documents none is held out, so nothing could "
            f"be evaluated.{hint}\nLower data.heldout_every, or split the text into more documents."
        )
    if ledger.train.documents == 0:
        raise DataError(
            f"data.source: of {n_entered} documents {ledger.heldout.documents} are held out and none is left to train "
            f"on.{hint}\nAdd documents, or raise data.heldout_every or data.near_duplicate."
        )
