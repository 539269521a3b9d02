"""Rows opened: a source, the kind of its rows found or set, and every row in its canonical form."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kajiya.config.options import MixturePart, MixtureSource
from kajiya.config.schema import DataConfig, SourceConfig
from kajiya.config.tables import check_options, nearest
from kajiya.data.conversations import KEYS, with_keys
from kajiya.data.entries import Document, Entry, Found, Row, Unreadable
from kajiya.data.formats import FORMATS, as_chat, canonical
from kajiya.data.mixture import Part, mix
from kajiya.data.origin import Origin, Source, open_source
from kajiya.data.values import RowError
from kajiya.errors import ConfigError

_OURS = sorted(set().union(*(variant for each in FORMATS.values() for variant in (*each.variants, each.optional))))

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
    return _open(source, config.format, config.columns, "data" if field == "data.source" else field)


def _open(source: Source, wanted: str, mapping: Mapping[str, str], where: str) -> Origin:
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

    def read() -> Iterator[Entry]:
        for found in source.read():
            yield _entry(found, kind, variant, outer, keys)

    read_as = {ours: outer.get(ours, ours) for ours in sorted(variant)} if there is not None else {}
    form = {"format": kind, "columns": read_as}
    return Origin(
        read=read,
        fingerprint=source.fingerprint,
        settings=source.settings | {"format": kind, "columns": dict(mapping)},
        facts=source.facts,
        form=form,
    )


# ---------------------------------------------------------------- the kind


def _columns(source: Source) -> list[str] | None:
    """Columns of the first row; `None` where the source yields texts, or nothing."""
    for found in source.read():
        if isinstance(found, Row):
            return list(found.columns)
        if isinstance(found, Document):
            return None
    return None


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
    for name, theirs in mapping.items():
        if theirs not in there:
            hint = nearest(theirs, there)
            raise ConfigError(
                f"{where}.columns.{name}",
                f"there is no column {theirs!r}; there is: {', '.join(there) or 'none'}"
                + (f"; {hint}" if hint else ""),
            )
    ours = {column for column in there if column not in mapping.values()} | set(mapping)
    kinds = FORMATS if wanted == "auto" else {wanted: FORMATS[wanted]}
    found = [(kind, variant) for kind, each in kinds.items() for variant in each.variants if variant <= ours]
    # A row with all columns of one kind and more of another is of the other.
    found = [(kind, variant) for kind, variant in found if not any(variant < other for _, other in found)]
    if len(found) > 1:
        mapped = [(kind, variant) for kind, variant in found if variant <= set(mapping)]
        found = mapped if len(mapped) == 1 else found
    if len(found) == 1:
        return found[0]
    columns = f"columns {', '.join(there) or 'none'}"
    if found:
        choices = "; ".join(f"{kind} ({', '.join(sorted(variant))})" for kind, variant in found)
        kinds_found = {kind for kind, _ in found}
        remedy = (
            f"Set {where}.format to one of {', '.join(sorted(kinds_found))}."
            if len(kinds_found) > 1
            else f"Say in {where}.columns which of them to read, for example {where}.columns.messages=messages."
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
        f"Say which column is which, for example {where}.columns.text={there[0] if there else 'body'}.",
    )


# ---------------------------------------------------------------- one row


def _entry(
    found: Found, kind: str, variant: frozenset[str], mapping: Mapping[str, str], keys: Mapping[str, str]
) -> Entry:
    if isinstance(found, Unreadable):
        return found
    if isinstance(found, Document):
        row = Row(found.name, {"text": found.text}, found.n_bytes, found.group)
        return found if kind == "text" else _entry(row, kind, variant, mapping, keys)
    try:
        view = _view(found, kind, variant, mapping)
        view |= {ours: with_keys(view[ours], keys) for ours in _HOLDS_MESSAGES & view.keys()}
        text = canonical(kind, FORMATS[kind].normalise(view))
    except RowError as error:
        return Unreadable(found.name, str(error), found.n_bytes)
    return Document(found.name, text, len(text.encode()), found.group)


def _view(row: Row, kind: str, variant: frozenset[str], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The columns that are read, under our names."""
    taken = set(mapping.values())
    view = {}
    for ours in (*sorted(variant), *sorted(FORMATS[kind].optional)):
        theirs = mapping.get(ours, ours)
        if theirs in row.columns and (ours in mapping or theirs not in taken):
            view[ours] = row.columns[theirs]
        elif ours in variant:
            raise RowError(f"has no column {theirs!r} (it has: {', '.join(map(str, row.columns)) or 'none'})")
    if not row.is_typed and kind == "labelled":
        view["label"] = _number(view["label"])
    return view


def _number(value: Any) -> Any:
    """What a text of CSV spells, where that is a number."""
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return value


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
        origin = _open(opened, part.format, part.columns, where)
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
