"""Rows opened: a source, the kind of its rows found or set, and every row in its canonical form."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from kajiya.config.options import MixturePart, MixtureSource
from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.config.tables import check_options, nearest
from kajiya.data.conversations import KEYS, with_keys
from kajiya.data.entries import Document, Entry, Found, Row, Unreadable
from kajiya.data.formats import FORMATS, KEEPING, PROMPT, Format, as_chat, canonical
from kajiya.data.mixture import Part, mix
from kajiya.data.origin import Origin, Source, open_source
from kajiya.data.values import RowError, escaped
from kajiya.errors import ConfigError

_OURS = sorted(
    {name for each in FORMATS.values() for pair in each.variants.items() for names in pair for name in names}
)
_SAMPLE_ROWS = 100
"""Rows whose columns, taken together, say what kind all are."""

_MESSAGE = "message."
"""Before our name of a message's key, in a column map."""
_HOLDS_MESSAGES = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected"})


def open_rows(config: DataConfig, field: str = "data.source") -> Origin:
    """The rows of the config's source as documents, with their kind (`Origin.form`); `field` is what errors name.

    Raises `ConfigError` for an ambiguous or unknown kind, for a column that is not there, and as `open_source` does.
    """
    source = open_source(config.source, field)
    if isinstance(source, MixtureSource):
        return _open_mixture(source, config)
    where = "data" if field == "data.source" else field
    return _open(source, config.format, config.columns, where, config.keep)


def _open(source: Source, wanted: str, mapping: Mapping[str, str], where: str, keep: Sequence[str]) -> Origin:
    known = [*_OURS, *(f"{_MESSAGE}{key}" for key in sorted(KEYS))]
    for key in mapping:
        if key not in known:
            hint = nearest(key, known)
            raise ConfigError(
                f"{where}.columns.{key}",
                "is no column that a row can have" + (f"; {hint}" if hint else f" (known: {', '.join(_OURS)})"),
                "It is written our name: your name, for example {prompt: question}.",
            )
    outer = {ours: theirs for ours, theirs in mapping.items() if not ours.startswith(_MESSAGE)}
    keys = {ours.removeprefix(_MESSAGE): theirs for ours, theirs in mapping.items() if ours.startswith(_MESSAGE)}
    there = _columns(source)
    kind, variant = _kind(there, wanted, outer, where)
    _require_kept(keep, there, kind)
    rows = _Rows(kind, variant, outer, keys, keep)
    for name in mapping:
        _require_read(name, kind, variant, where)
    if wanted == "auto" and there is not None:
        rows.refuse_others(there, where)

    def read() -> Iterator[Entry]:
        return map(rows.entry, source.read())

    return Origin(
        read=read,
        fingerprint=source.fingerprint,
        settings=source.settings | {"format": kind, "columns": dict(mapping)} | ({"keep": list(keep)} if keep else {}),
        facts=source.facts,
        form={"format": kind, "columns": {ours: rows.read[ours] for ours in sorted(variant)} if there else {}},
        unread=tuple(column for column in there or () if column not in (*rows.read.values(), *keep)),
    )


# ---------------------------------------------------------------- the kind


def _columns(source: Source) -> list[str] | None:
    """Columns that the first rows have between them, none where nothing can be read; `None` where the source yields texts."""
    columns: dict[str, None] = {}
    n_rows = 0
    for found in source.read():
        if isinstance(found, Document) and not n_rows:
            return None
        if isinstance(found, Row):
            columns |= dict.fromkeys(found.columns)
            n_rows += 1
            if n_rows == _SAMPLE_ROWS:
                break
    return list(columns)


def _ours(columns: Iterable[str], mapping: Mapping[str, str]) -> set[str]:
    """Our names of a row's columns."""
    there = set(columns)
    return there.difference(mapping.values()) | {ours for ours, theirs in mapping.items() if theirs in there}


def _fitting(ours: Set[str], kinds: Mapping[str, Format]) -> list[tuple[str, frozenset[str]]]:
    """The kinds that these columns make, each with the columns that make it."""
    found = [(kind, variant) for kind, each in kinds.items() for variant in each.variants if variant <= ours]
    # A row with all columns of one kind and more of another is of the other; prompts alone are of no other kind.
    largest = [(kind, variant) for kind, variant in found if not any(variant < other for _, other in found)]
    return [(kind, variant) for kind, variant in largest if kind != PROMPT] or largest


def _kind(
    there: Sequence[str] | None, wanted: str, mapping: Mapping[str, str], where: str
) -> tuple[str, frozenset[str]]:
    """The kind of the rows and the columns that make it."""
    if there is None:
        if wanted not in ("auto", "text"):
            raise ConfigError(f"{where}.format", f"{wanted} needs rows with columns, and this source yields texts")
        if mapping:
            raise ConfigError(f"{where}.columns", "is set, and this source yields texts without columns")
        return "text", frozenset({"text"})
    kinds = FORMATS if wanted == "auto" else {wanted: FORMATS[wanted]}
    first, simplest = next((kind, next(iter(each.variants))) for kind, each in kinds.items())
    if not there:
        # What could not be read, and why, is said as it is read.
        return first, simplest
    for name, theirs in mapping.items():
        if theirs not in there:
            hint = nearest(theirs, there)
            raise ConfigError(
                f"{where}.columns.{name}",
                f"there is no column {theirs!r}; there is: {', '.join(there)}" + (f"; {hint}" if hint else ""),
            )
    ours = _ours(there, mapping)
    found = _fitting(ours, kinds)
    if len(found) > 1:
        mapped = [(kind, variant) for kind, variant in found if variant <= set(mapping)]
        found = mapped if len(mapped) == 1 else found
    if len(found) == 1:
        return found[0]
    columns = f"columns {', '.join(map(escaped, there))}"
    if found:
        choices = "; ".join(f"{kind} ({', '.join(sorted(variant))})" for kind, variant in found)
        kinds_found = {kind for kind, _ in found}
        example = ", ".join(f"{name}: {mapping.get(name, name)}" for name in sorted(found[0][1]))
        remedy = (
            f"Set {where}.format to one of {', '.join(sorted(kinds_found))}."
            if len(kinds_found) > 1
            else f"Say in {where}.columns which of them to read, for example {where}.columns={{{example}}}."
        )
        raise ConfigError(f"{where}.format", f"{columns} fit more than one kind of rows: {choices}", remedy)
    choices = "; ".join(
        f"{kind}: {' or '.join(' + '.join(sorted(variant)) for variant in each.variants)}"
        for kind, each in kinds.items()
    )
    what = "no kind of rows" if wanted == "auto" else f"no {wanted} rows"
    raise ConfigError(
        f"{where}.columns",
        f"{columns} make {what} ({choices})",
        f"Say which column is which, for example {where}.columns.{max(simplest - ours)}={escaped(there[0])}.",
    )


def _require_kept(keep: Sequence[str], there: Sequence[str] | None, kind: str) -> None:
    """Refuse columns to be kept that are not there, or that rows of this kind do not keep."""
    if keep and kind not in KEEPING:
        raise ConfigError(
            "data.keep", f"{kind} rows are not judged by rewards, and keep no columns", "Set data.keep=[]."
        )
    for name in keep:
        # Where nothing could be read, what is wrong is said as it is read.
        if there and name not in there:
            hint = nearest(name, there)
            raise ConfigError(
                "data.keep",
                f"there is no column {name!r}; there is: {', '.join(there)}" + (f"; {hint}" if hint else ""),
            )


def _require_read(name: str, kind: str, variant: frozenset[str], where: str) -> None:
    """Refuse a name in a column map that rows of this kind do not have."""
    known = variant | FORMATS[kind].variants[variant]
    if name.startswith(_MESSAGE):
        problem = None if known & _HOLDS_MESSAGES else f"{kind} rows hold no messages"
    else:
        problem = f"{kind} rows of {', '.join(sorted(variant))} have no such column"
        others = sorted(FORMATS[kind].variants[variant])
        problem = None if name in known else problem + (f" (known: {', '.join(others)})" if others else "")
    if problem:
        raise ConfigError(
            f"{where}.columns.{name}", problem, f"Leave it out, or set {where}.format to the kind of rows that has it."
        )


# ---------------------------------------------------------------- one row


class _Rows:
    """What makes documents of the rows of one kind."""

    def __init__(
        self,
        kind: str,
        variant: frozenset[str],
        mapping: Mapping[str, str],
        keys: Mapping[str, str],
        keep: Sequence[str] = (),
    ) -> None:
        self._kind = kind
        self._variant = variant
        self._mapping = mapping
        self._keys = keys
        self._keep = keep
        names = (*sorted(variant), *sorted(FORMATS[kind].variants[variant]))
        taken = set(mapping.values())
        self.read = {ours: mapping.get(ours, ours) for ours in names if ours in mapping or ours not in taken}
        """Our name of each column that is read → the source's."""
        self._telling: frozenset[str] = frozenset()
        self._allowed: list[tuple[str, frozenset[str]]] = []
        self._verdicts: dict[frozenset[str], str | None] = {}
        self._usual: frozenset[str] = frozenset()
        self._where = ""

    def refuse_others(self, there: Sequence[str], where: str) -> None:
        """From now on refuse rows whose columns make them of another kind, as those that were seen (`there`) are not."""
        self._telling = frozenset({*_OURS, *self._mapping.values()})
        self._allowed = _fitting(_ours(there, self._mapping), FORMATS)
        self._where = where

    def entry(self, found: Found) -> Entry:
        """The document of a row, or what is wrong with it."""
        if isinstance(found, Unreadable):
            return found
        if isinstance(found, Document):
            row = Row(found.name, {"text": found.text}, found.n_bytes, found.group)
            return found if self._kind == "text" else self.entry(row)
        try:
            view = self._view(found)
            view |= {ours: with_keys(view[ours], self._keys) for ours in _HOLDS_MESSAGES & view.keys()}
            made = FORMATS[self._kind].normalise(view)
            text = canonical(self._kind, made | {"row": self._kept(found)} if self._keep else made)
        except RowError as error:
            return Unreadable(found.name, escaped(str(error)), found.n_bytes)
        except RecursionError:
            return Unreadable(found.name, "is nested too deeply", found.n_bytes)
        return Document(found.name, text, len(text.encode()), found.group)

    def _view(self, row: Row) -> dict[str, Any]:
        """The columns that are read, under our names."""
        view = {}
        for ours, theirs in self.read.items():
            if theirs in row.columns:
                view[ours] = row.columns[theirs]
            elif ours in self._variant:
                raise RowError(f"has no column {theirs!r} (it has: {', '.join(map(str, row.columns)) or 'none'})")
        if self._telling and row.columns.keys() != self._usual:
            self._require_kind(row.columns)
        if not row.is_typed and self._kind == "labelled":
            view["label"] = _number(view["label"])
        return view

    def _kept(self, row: Row) -> dict[str, Any]:
        """The columns that rewards see."""
        missing = next((name for name in self._keep if name not in row.columns), None)
        if missing is not None:
            raise RowError(f"has no column {missing!r} (data.keep)")
        return {name: row.columns[name] for name in self._keep}

    def _require_kind(self, columns: Mapping[str, Any]) -> None:
        telling = self._telling.intersection(columns)
        if telling not in self._verdicts:
            self._verdicts[telling] = self._other_kind(telling)
        if problem := self._verdicts[telling]:
            raise RowError(problem)
        self._usual = frozenset(columns)

    def _other_kind(self, columns: frozenset[str]) -> str | None:
        """What makes a row of these columns one of another kind."""
        others = [fit for fit in _fitting(_ours(columns, self._mapping), FORMATS) if fit not in self._allowed]
        if not others:
            return None
        more = sorted(set().union(*(variant for _, variant in others)) - self._variant)
        return (
            f"has {', '.join(self._mapping.get(name, name) for name in more)}, which {self._kind} rows do not, but "
            f"{' or '.join(kind for kind, _ in others)} rows; {self._where}.format={self._kind} reads it without"
        )


def _number(value: Any) -> Any:
    """What a text of CSV spells, where that is a number; `01` and `1_0` are names."""
    if not isinstance(value, str) or "_" in value:
        return value
    try:
        number = int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            return value
    return number if str(number) == value else value


# ---------------------------------------------------------------- mixtures


def _open_mixture(options: MixtureSource, config: DataConfig) -> Origin:
    if config.columns:
        raise ConfigError(
            "data.columns", "a mixture's parts have columns each", "Set data.source.options.parts[…].columns."
        )
    if len(options.parts) < 2:
        raise ConfigError("data.source.options.parts", f"holds {len(options.parts)} parts; a mixture has two or more")
    parts = []
    for number, given in enumerate(options.parts):
        where = f"data.source.options.parts[{number}]"
        part = check_options(MixturePart, given, where)
        source = SourceConfig(**check_options(SourceConfig, part.source, f"{where}.source").__dict__)
        opened = open_source(source, f"{where}.source")
        if isinstance(opened, MixtureSource):
            raise ConfigError(f"{where}.source.name", "a mixture is no part of a mixture", "List its parts here.")
        origin = _open(opened, part.format, part.columns, where, config.keep)
        parts.append(Part(part.label or f"{number}-{source.name}", origin, part.weight, part.max_rows))
    kinds = [part.origin.form["format"] for part in parts]
    kind = _common_kind(kinds, config.format)
    parts = [replace(part, origin=_converted(part.origin, kind)) for part in parts]
    return mix(parts, options.seed, kind)


def _common_kind(kinds: Sequence[str], wanted: str) -> str:
    """The kind of a mixture: that of its parts; instructions beside conversations become conversations."""
    distinct = set(kinds) | ({wanted} if wanted != "auto" else set())
    if len(distinct) == 1:
        return kinds[0]
    if distinct == {"chat", "instruction"} and wanted != "instruction":
        return "chat"
    said = ", ".join(f"part {number}: {kind}" for number, kind in enumerate(kinds))
    raise ConfigError(
        "data.format",
        f"the parts of the mixture are of kinds that do not go together ({said})"
        + ("" if wanted == "auto" else f", or not {wanted}"),
        "Set parts[…].format and parts[…].columns, or train on them apart.",
    )


def _converted(origin: Origin, kind: str) -> Origin:
    if origin.form["format"] == kind:
        return origin

    def read() -> Iterator[Entry]:
        for entry in origin.read():
            if isinstance(entry, Document):
                text = canonical(kind, as_chat(json.loads(entry.text)))
                yield replace(entry, text=text, n_bytes=len(text.encode()))
            else:
                yield entry

    return replace(origin, read=read)
