"""What a person points at when two data sets or two models' outputs are compared: rows of files, a run's text, its answers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.options import LinesSource, TableSource, TextSource
from kajiya.data import columnar, sources
from kajiya.data.documents import open_documents
from kajiya.data.entries import Document, Found, Row, Unreadable
from kajiya.errors import ConfigError, DataError, StoreError
from kajiya.run.folder import find_run
from kajiya.run.store import Store

_READERS: dict[str, Callable[[str], Iterator[Found]]] = {
    ".jsonl": lambda files: sources.jsonl(LinesSource(files=files)),
    ".csv": lambda files: sources.csv_rows(TableSource(files=files)),
    ".parquet": lambda files: columnar.parquet(TableSource(files=files)),
    ".txt": lambda files: sources.text(TextSource(files=files)),
}
_SPLITS = ("train", "heldout")
_TASK = "task "


@dataclass
class Sample:
    """One side of a comparison."""

    name: str
    texts: list[str] = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    """Numeric columns, by name, over the rows that have them."""
    n_unreadable: int = 0

    def take(self, row: dict[str, Any], keys: tuple[str, ...]) -> None:
        """One row: the texts of `keys` (all its texts, when there are none) as one, every number for itself."""
        chosen = [row.get(key) for key in keys] if keys else list(row.values())
        said = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in chosen
                if isinstance(value, (str, list, dict))]  # fmt: skip
        if said:
            self.texts.append("\n".join(said))
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value):
                self.numbers.setdefault(key, []).append(float(value))


def read_sample(what: str, store: Store, keys: tuple[str, ...], limit: int | None) -> Sample:
    """The rows of a file or glob (jsonl, csv, parquet, txt), of a run's text (`RUN`, `RUN:heldout`), or a model's answers
    to a task (`RUN:task/NAME`); at most `limit` of them, spread evenly.

    Raises `ConfigError` for what is none of these, `DataError` for nothing in it.
    """
    sample = Sample(what)
    suffix = Path(what).suffix
    if suffix in _READERS:
        for found in _READERS[suffix](what):
            if isinstance(found, Unreadable):
                sample.n_unreadable += 1
            elif isinstance(found, Document):
                sample.texts.append(found.text)
            elif isinstance(found, Row):
                sample.take(dict(found.columns), keys)
    else:
        _read_run(sample, what, store)
    if not sample.texts and not sample.numbers:
        raise DataError(f"{what}: there is no text and no number in it" + (f" under {', '.join(keys)}" if keys else ""))
    if limit is not None and len(sample.texts) > limit:
        kept = np.linspace(0, len(sample.texts) - 1, limit).round().astype(int)
        sample.texts = [sample.texts[i] for i in kept]
    return sample


def _read_run(sample: Sample, what: str, store: Store) -> None:
    name, _, part = what.partition(":")
    part = part or "train"
    try:
        run = find_run(store, name)
    except StoreError as problem:
        raise ConfigError(
            what,
            f"is no file of a known kind ({', '.join(_READERS)}) and no run of {store.root}",
            "For example data/a.jsonl, RUN, RUN:heldout or RUN:task/stdlib-next-line.",
        ) from problem
    listed = run.manifest()["artifacts"]
    if part in _SPLITS and "corpus" in listed:
        documents = open_documents(store.root / listed["corpus"]["path"], part)
        sample.texts = list(documents.texts())
        return
    task = _TASK + part.removeprefix("task/")
    if task not in listed:
        known = [*_SPLITS, *(f"task/{each.removeprefix(_TASK)}" for each in listed if each.startswith(_TASK))]
        raise ConfigError(what, f"run {run.id} has no {part!r}; it has {', '.join(known)}")
    from pyarrow import parquet

    rows = parquet.read_table(store.root / listed[task]["path"] / "rows.parquet", columns=["answers"]).to_pylist()
    sample.texts = [text for row in rows for text in row["answers"]]
