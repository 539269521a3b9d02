"""The corpus: a source read once, split, cleaned of what the held-out side also holds; every document accounted for."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.config.tables import TABLES
from kajiya.data.cleaning import clean
from kajiya.data.digests import Digests, digest_of
from kajiya.data.documents import Documents, DocumentWriter, open_documents
from kajiya.data.entries import Document, Entry, Omitted, Unreadable
from kajiya.data.formats import class_names, prompt_of
from kajiya.data.ledger import EMPTY, LOST, NOT_DRAWN, CorpusLedger, Tally
from kajiya.data.minhash import MOST_IN_BUCKET
from kajiya.data.origin import Origin
from kajiya.data.progress import OnEvent, Progress, silent
from kajiya.data.reading import open_rows
from kajiya.data.values import escaped
from kajiya.errors import ConfigError, DataError
from kajiya.run.code import code_revision
from kajiya.run.store import Artifact, Store, produce

STAGE = "corpus"
UNREADABLE = "unreadable"
SEPARATORS = "separators between documents"
_CLEANING = (
    "near_duplicate",
    "duplicates",
    "minhash_similarity",
    "minhash_words",
    "contamination_words",
    "contamination_share",
)


def build_corpus(config: DataConfig, store: Store, on_event: OnEvent = silent) -> tuple[Artifact, bool]:
    """Read, split and deduplicate the source; returns the artifact, and whether it was there already.

    The artifact's folder holds the splits `train` and `heldout` (`kajiya.data.documents`); its fact `ledger` says what
    became of every document. Raises `DataError` for an unreadable document (unless `on_unreadable` is `drop`), for a
    source without documents, and for a split that stays empty.
    """
    origins = _open(config)
    fingerprints = {field: origin.fingerprint() for field, origin in origins.items()}
    if found := _found(config, origins):
        on_event("derived", values=found)
        on_event(
            "note", text=f"found in the rows: {', '.join(f'{key}={_said(value)}' for key, value in found.items())}"
        )
    for field, origin in origins.items():
        if origin.unread:
            on_event("note", text=f"data.{field}: columns that are not read: {', '.join(map(escaped, origin.unread))}")

    def make(folder: Path) -> dict[str, Any]:
        facts = _write(config, origins, folder, on_event)
        for field, origin in origins.items():
            if origin.fingerprint() != fingerprints[field]:
                raise DataError(
                    f"data.{field}: its content changed while it was read, or differs from one reading to the next.\n"
                    "Run it again when nothing writes to it; a source of your own must yield the same documents each time."
                )
        return facts

    parts = config.source.options["parts"] if config.source.name == "mixture" else []
    names = [config.source.name, *(part["source"]["name"] for part in parts)]
    names += [config.heldout_source.name] if config.heldout_source.name else []
    return produce(
        store,
        STAGE,
        code=code_revision("kajiya.data.corpus", *source_modules(*names)),
        config={
            **{field: origin.settings | {"content": fingerprints[field]} for field, origin in origins.items()},
            "heldout_every": config.heldout_every if len(origins) == 1 else None,
            **({} if config.heldout_by == "name" else {"heldout_by": config.heldout_by}),
            "on_unreadable": config.on_unreadable,
            **{name: getattr(config, name) for name in _CLEANING},
        },
        parents={},
        make=make,
    )


def _open(config: DataConfig) -> dict[str, Origin]:
    """The rows of the source, and those of a source for the held-out side, which are of the same kind."""
    origins = {"source": open_rows(config)}
    held = config.heldout_source
    if held.name is not None:
        source, kind = SourceConfig(held.name, held.options), origins["source"].form["format"]
        columns = held.columns or ({} if held.name == "mixture" else config.columns)
        given = replace(config, source=source, format=kind, columns=columns)
        origins["heldout_source"] = open_rows(given, "data.heldout_source")
    return origins


def _found(config: DataConfig, origins: dict[str, Origin]) -> dict[str, Any]:
    """What was not set and was found by the columns of the rows, by the setting that would say it."""
    found: dict[str, Any] = {}
    form = origins["source"].form
    if config.format == "auto" and form["columns"]:
        found = {f"data.{key}": value for key, value in form.items()}
    if config.source.name == "mixture":
        parts = zip(config.source.options["parts"], origins["source"].facts["options"]["parts"], strict=True)
        for number, (given, part) in enumerate(parts):
            if part["columns"] and ("format" not in given or given["format"] == "auto"):
                found |= {f"data.source.options.parts[{number}].{key}": part[key] for key in ("format", "columns")}
    if "heldout_source" in origins and (columns := origins["heldout_source"].form["columns"]):
        found["data.heldout_source.columns"] = columns
    return found


def _said(value: Any) -> str:
    """A value as it is written on the command line."""
    return (
        "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in value.items()) + "}"
        if isinstance(value, dict)
        else value
    )


def source_modules(*names: str) -> list[str]:
    """The modules of the sources of those names; of a user's own function its content alone counts, so it has none."""
    return sorted({TABLES["source"][name].target.partition(":")[0] for name in names if ":" not in name})


def is_heldout(name: str, heldout_every: int) -> bool:
    """Whether the document of that name is held out: one in `heldout_every`, by a hash of the name alone."""
    return int(hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest(), 16) % heldout_every == 0


# ---------------------------------------------------------------- reading


def _write(config: DataConfig, origins: dict[str, Origin], folder: Path, on_event: OnEvent) -> dict[str, Any]:
    ledger = CorpusLedger()
    train, heldout = _read(config, origins, folder, ledger, Progress(on_event, STAGE, "bytes"))
    undone = clean(config, train, heldout, origins["source"].form["format"] == "text", ledger)
    if undone:
        on_event(
            "note",
            text=f"data.duplicates=minhash: {undone['compared_in_part']} rows have more than {MOST_IN_BUCKET} likely doubles in "
            f"one bucket, and were compared with the latest {MOST_IN_BUCKET} of each; nearly equal ones may be left",
        )
    kept = open_documents(folder, "train")
    assert (len(kept), kept.n_bytes) == (ledger.train.documents, ledger.train.bytes), "not what the ledger says"
    assert (len(heldout), heldout.n_bytes) == (ledger.heldout.documents, ledger.heldout.bytes), "not what it says"
    _require_documents(config, ledger)
    form = origins["source"].form
    every = config.heldout_every if "heldout_source" not in origins else None
    facts: dict[str, Any] = {field: origin.facts for field, origin in origins.items()}
    facts |= form | {"heldout_every": every, "ledger": ledger.facts()} | undone
    if form["format"] == "labelled":
        labels = (json.loads(text)["label"] for documents in (kept, heldout) for text in documents.texts())
        facts["classes"] = class_names(labels)
    return facts


def _read(
    config: DataConfig, origins: dict[str, Origin], folder: Path, ledger: CorpusLedger, progress: Progress
) -> tuple[Documents, Documents]:
    """Write every readable document to its side; the training side is not yet cleaned."""
    by_name = len(origins) == 1
    kind = origins["source"].form["format"]
    with DocumentWriter(folder, "train") as train, DocumentWriter(folder, "heldout") as heldout:
        held = (heldout, ledger.heldout)
        # Documents to train on are counted when they have passed the cleaning.
        sides = {"source": (train, Tally()), "heldout_source": held}
        for field, origin in origins.items():

            def side(entry: Document, field: str = field) -> tuple[DocumentWriter, Tally]:
                is_held = by_name and is_heldout(_split_by(config, kind, entry), config.heldout_every)
                return held if is_held else sides[field]

            _sort(config, _named_once(origin.read()), side, ledger, progress)
        progress.end()
        return train.finish(), heldout.finish()


def _split_by(config: DataConfig, kind: str, entry: Document) -> str:
    """What the document's side hangs on."""
    if config.heldout_by == "name":
        return entry.group or entry.name
    prompt = prompt_of(kind, entry.text)
    if prompt is None:
        raise ConfigError("data.heldout_by", f"{kind} rows have no prompt apart", "Set it to name.")
    return prompt


def _sort(
    config: DataConfig,
    entries: Iterator[Entry],
    side: Callable[[Document], tuple[DocumentWriter, Tally]],
    ledger: CorpusLedger,
    progress: Progress,
) -> None:
    for entry in entries:
        ledger.entered.add(entry.n_bytes)
        if not isinstance(entry, Omitted) and entry.separator_bytes:
            # Bytes and no row.
            ledger.entered.bytes += entry.separator_bytes
            ledger.dropped.setdefault(SEPARATORS, Tally(kind=EMPTY)).bytes += entry.separator_bytes
            progress.add(entry.separator_bytes)
        progress.add(entry.n_bytes)
        if isinstance(entry, Document):
            writer, tally = side(entry)
            writer.add(entry.name, entry.text.encode())
            tally.add(entry.n_bytes)
        elif isinstance(entry, Omitted):
            ledger.drop(NOT_DRAWN, entry.reason, entry.n_bytes, entry.name)
        elif config.on_unreadable == "error":
            raise DataError(
                f"{entry.name}: {entry.reason}\n"
                "Mend or remove it, or set data.on_unreadable=drop to leave such documents out, counted."
            )
        else:
            ledger.drop(LOST, UNREADABLE, entry.n_bytes, f"{entry.name}: {entry.reason}")


def _named_once(entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries; one that has an earlier one's name is unreadable, since split, ledger and scores go by names."""
    seen = Digests()
    for number, entry in enumerate(entries):
        key = digest_of(entry.name.encode(errors="backslashreplace"))
        is_known = seen.first(key) is not None
        if isinstance(entry, Document) and is_known:
            yield Unreadable(
                entry.name, "has the name of an earlier row; give each row a name of its own", entry.n_bytes
            )
            continue
        if not is_known:
            seen.add(key, number)
        yield entry


def _require_documents(config: DataConfig, ledger: CorpusLedger) -> None:
    n_entered = ledger.entered.documents
    dropped = "; ".join(
        f"{tally.documents} {reason}" for reason, tally in sorted(ledger.dropped.items()) if tally.documents
    )
    if n_entered == 0:
        raise DataError("data.source: it holds no documents.\nCheck data.source.options.")
    examples = [example for tally in ledger.dropped.values() for example in tally.examples[:1]]
    hint = f" Dropped: {dropped} (for example {examples[0]})." if examples else ""
    if ledger.heldout.documents == 0 and config.heldout_source.name is not None:
        raise DataError(
            f"data.heldout_source: it holds no documents, so nothing could be evaluated.{hint}\n"
            "Check data.heldout_source.options."
        )
    if ledger.heldout.documents == 0:
        raise DataError(
            f"data.heldout_every={config.heldout_every}: of {n_entered} documents none is held out, so nothing could "
            f"be evaluated.{hint}\nLower data.heldout_every, or {_more_documents(config)}."
        )
    if ledger.train.documents == 0:
        raise DataError(
            f"data.source: of {n_entered} documents {ledger.heldout.documents} are held out and none is left to train "
            f"on.{hint}\nAdd documents, or raise data.heldout_every or data.near_duplicate, or {_more_documents(config)}."
        )


def _more_documents(config: DataConfig) -> str:
    """How the same text makes more documents."""
    if config.source.name == "text" and config.source.options.get("split_on") is None:
        return "cut the files into documents with data.source.options.split_on=blank_line"
    return "split the text into more documents"
