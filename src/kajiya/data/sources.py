"""Where documents come from: each source yields, in an order that is always the same, what it could read and what not.

Text is taken exactly as it is: line ends and byte-order marks of text files stay, so that `text.encode()` is the file.
"""

import csv
import glob
import io
import json
import os
import sys
import sysconfig
import tokenize
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kajiya.config.options import HubSource, StdlibSource, TableSource, TextSource
from kajiya.errors import ConfigError, DataError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_FILES_FIELD = "data.source.options.files"
_COLUMN_FIELD = "data.source.options.column"


@dataclass(frozen=True)
class Document:
    """One document."""

    name: str
    """Relative POSIX path, or `file:line` for a row of a file. The held-out split is a hash of it."""
    text: str
    """The text; it always has a UTF-8 form."""
    n_bytes: int
    """Length of the text in UTF-8, bytes; for a UTF-8 file, its size."""


@dataclass(frozen=True)
class Unreadable:
    """A file or row that is no text."""

    name: str
    """As a `Document`'s."""
    reason: str
    """What is wrong, to be read after the name."""
    n_bytes: int = 0
    """Size of what could not be read, bytes; 0 where it is not known."""


Entry = Document | Unreadable
SourceFile = tuple[str, Path]
"""Name within the source, and where the file is."""


# ---------------------------------------------------------------- files


def stdlib(options: StdlibSource) -> Iterator[Entry]:
    """Every `.py` file of the standard library (or of `root`) outside site-packages and test folders."""
    for name, path in stdlib_files(options):
        entry = _read_text(name, path, "utf-8")
        yield _with_declared_coding(entry, path) if isinstance(entry, Unreadable) else entry


def text(options: TextSource) -> Iterator[Entry]:
    """Every file that the glob matches, whole."""
    try:
        "".encode(options.encoding)
    except LookupError as error:
        raise ConfigError(
            "data.source.options.encoding", f"{options.encoding!r} is no text encoding that Python knows"
        ) from error
    for name, path in matching_files(options.files):
        yield _read_text(name, path, options.encoding)


def jsonl(options: TableSource) -> Iterator[Entry]:
    """One document a line: the string under `column` of each line's JSON object. Blank lines are no rows."""
    for file, path in matching_files(options.files):
        try:
            with path.open("rb") as handle:
                for number, line in enumerate(handle, start=1):
                    row = line.removeprefix(BOM_UTF8) if number == 1 else line
                    if row.strip():
                        yield _json_row(f"{file}:{number}", row, options.column)
        except OSError as error:
            yield _not_opened(file, error)


def csv_rows(options: TableSource) -> Iterator[Entry]:
    """One document a record, named by the line on which it begins; the first record holds the column names."""
    # The module's own limit (128 KiB a field) would refuse long documents.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    for file, path in matching_files(options.files):
        try:
            # Undecodable bytes become surrogates and are then refused row by row, not file by file.
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
                yield from _csv_file(file, handle, options.column)
        except OSError as error:
            yield _not_opened(file, error)


def parquet(options: TableSource) -> Iterator[Entry]:
    """One document a row, named `file:row` from 0; memory holds one batch of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file, path in matching_files(options.files):
        try:
            table = pq.ParquetFile(path)
        except OSError as error:
            yield _not_opened(file, error)
            continue
        except pa.ArrowInvalid as error:
            yield Unreadable(file, f"is no parquet file ({error})", path.stat().st_size)
            continue
        with table:
            _require_column(options.column, table.schema_arrow.names, file)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[options.column]):
                for value in _as_bytes(batch.column(0), options.column, file):
                    yield _row(f"{file}:{number}", value, options.column)
                    number += 1


def stdlib_files(options: StdlibSource) -> list[SourceFile]:
    """The files of `stdlib`, sorted by name."""
    root = Path(options.root).expanduser() if options.root else Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ConfigError("data.source.options.root", f"{str(root)!r} is no folder")
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_LIBRARY]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(_name(path, root), path) for path in paths]
    return sorted(found)


def matching_files(pattern: str) -> list[SourceFile]:
    """The files that a glob matches, sorted by name; names are relative to the glob's part without wildcards."""
    if not pattern:
        raise ConfigError(_FILES_FIELD, "is not set", "Give a glob of the files, for example 'corpus/**/*.txt'.")
    pattern = os.path.expanduser(pattern)
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = [path for path in matches if path.is_file()]
    if not files:
        what = "is a folder" if Path(pattern).is_dir() else f"matches no file in {os.getcwd()}"
        raise ConfigError(
            _FILES_FIELD, f"{pattern!r} {what}", "Give a glob of files; '**/' stands for every folder below."
        )
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    root = Path(fixed) if Path(fixed).is_dir() else Path(fixed).parent
    return sorted((_name(path, root), path) for path in files)


# ---------------------------------------------------------------- datasets


def hub(options: HubSource) -> Iterator[Entry]:
    """One document a row of a Hugging Face data set, or of a folder saved by `datasets.save_to_disk`."""
    rows = _load_rows(options)
    if rows.column_names is not None:
        _require_column(options.column, rows.column_names, options.path)
        rows = rows.select_columns([options.column])
    for number, row in enumerate(rows):
        name = f"{options.split}:{number}"
        if options.column not in row:
            yield Unreadable(name, f"has no column {options.column!r} (it has: {', '.join(row) or 'none'})")
        else:
            yield _row(name, row[options.column], options.column)


def is_local(options: HubSource) -> bool:
    """Whether the data set is a folder on this machine."""
    return Path(options.path).expanduser().is_dir()


def _load_rows(options: HubSource) -> Any:
    import datasets

    if not options.path:
        raise ConfigError("data.source.options.path", "is not set", "Give a hub name or a folder.")
    try:
        if not is_local(options):
            return datasets.load_dataset(
                options.path,
                name=options.subset,
                split=options.split,
                revision=options.revision,
                streaming=options.streaming,
            )
        saved = datasets.load_from_disk(str(Path(options.path).expanduser()))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{options.path}: the data set could not be loaded: {reason}\n"
            "data.source.options.path is a hub name (which needs the network), or a folder saved by "
            "`datasets.save_to_disk`; subset, split and revision must exist in it."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if options.split not in saved:
            raise ConfigError(
                "data.source.options.split",
                f"{options.split!r} is not one of {', '.join(sorted(map(str, saved)))} in {options.path}",
            )
        return saved[options.split]
    return saved


# ---------------------------------------------------------------- the user's own


def from_function(function: Callable[..., Any], options: Mapping[str, Any]) -> Iterator[Entry]:
    """What the user's own function yields: documents, strings, or dicts with `text` and perhaps `name`."""
    where = f"{function.__module__}:{function.__qualname__}"
    found = function(**options)
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Mapping)):
        raise DataError(
            f"{where} returned {type(found).__name__}.\nA source yields documents: strings, dicts with 'text' and "
            "perhaps 'name', or kajiya.data.sources.Document."
        )
    for number, item in enumerate(found):
        name = f"{number:08d}"
        if isinstance(item, (Document, Unreadable)):
            yield _row(item.name, item.text, "text") if isinstance(item, Document) else item
        elif isinstance(item, Mapping) and "text" in item:
            yield _row(str(item["name"]) if "name" in item else name, item["text"], "text")
        elif isinstance(item, str):
            yield _row(name, item, "text")
        else:
            has = f" with {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
            yield Unreadable(name, f"{where} yielded {type(item).__name__}{has}, not text")


# ---------------------------------------------------------------- one file, one row


def _name(path: Path, root: Path) -> str:
    """Relative POSIX path; bytes of a file name that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", errors="backslashreplace")


def _not_opened(name: str, error: OSError) -> Unreadable:
    if isinstance(error, FileNotFoundError):
        return Unreadable(name, "vanished: it was listed and is no longer there")
    return Unreadable(name, f"cannot be read: {error.strerror or error}")


def _read_text(name: str, path: Path, encoding: str) -> Entry:
    try:
        raw = path.read_bytes()
    except OSError as error:
        return _not_opened(name, error)
    return _decode(name, raw, encoding)


def _decode(name: str, raw: bytes, encoding: str) -> Entry:
    try:
        decoded = raw.decode(encoding)
        n_bytes = len(decoded.encode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return Unreadable(name, f"is not {encoding}: byte 0x{raw[error.start]:02x} on line {line}", len(raw))
    except UnicodeEncodeError:
        return Unreadable(name, f"holds lone surrogates when read as {encoding}", len(raw))
    return Document(name, decoded, n_bytes)


def _with_declared_coding(entry: Unreadable, path: Path) -> Unreadable:
    """Add the coding that a Python file declares, where it explains why the file is not UTF-8."""
    try:
        with path.open("rb") as handle:
            declared, _ = tokenize.detect_encoding(handle.readline)
    except (OSError, SyntaxError):
        return entry
    if declared.startswith("utf-8"):
        return entry
    return Unreadable(entry.name, f"{entry.reason} (it declares {declared})", entry.n_bytes)


def _json_row(name: str, line: bytes, column: str) -> Entry:
    try:
        row = json.loads(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Unreadable(name, f"is not utf-8: byte 0x{line[error.start]:02x} at {error.start}", len(line))
    except (ValueError, RecursionError) as error:
        return Unreadable(name, f"is no JSON: {error}", len(line))
    if not isinstance(row, dict):
        return Unreadable(name, f"is a JSON {type(row).__name__}, not an object with a key {column!r}", len(line))
    if column not in row:
        return Unreadable(name, f"has no key {column!r} (it has: {', '.join(row) or 'none'})", len(line))
    return _row(name, row[column], column)


def _csv_file(file: str, handle: io.TextIOBase, column: str) -> Iterator[Entry]:
    reader = csv.reader(handle, strict=True)
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        _require_column(column, header, file)
        index = header.index(column)
        while True:
            line = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(header):
                n_bytes = len(",".join(row).encode(errors="surrogateescape"))
                yield Unreadable(f"{file}:{line}", f"has {len(row)} fields, the header has {len(header)}", n_bytes)
            else:
                yield _row(f"{file}:{line}", row[index], column)
    except csv.Error as error:
        # Where a quote is never closed, no later record of the file can be told apart.
        yield Unreadable(f"{file}:{line}", f"is broken CSV, and the rest of the file with it: {error}")


def _as_bytes(values: Any, column: str, file: str) -> list[bytes | None]:
    """A column as UTF-8 bytes: a value that is not valid is then refused alone, not with its whole batch."""
    import pyarrow as pa

    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(_COLUMN_FIELD, f"column {column!r} of {file} holds {values.type}, not text")
    return list(values.cast(kind).cast(pa.large_binary()).to_pylist())


def _row(name: str, value: Any, column: str) -> Entry:
    if isinstance(value, bytes):
        return _decode(name, value, "utf-8")
    if not isinstance(value, str):
        held = "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
        return Unreadable(name, f"holds {held} under {column!r}, not text")
    try:
        return Document(name, value, len(value.encode()))
    except UnicodeEncodeError as error:
        bad = ord(value[error.start])
        n_bytes = len(value.encode(errors="surrogatepass"))
        if 0xDC80 <= bad <= 0xDCFF:
            return Unreadable(name, f"is not utf-8: byte 0x{bad - 0xDC00:02x} under {column!r}", n_bytes)
        return Unreadable(name, f"holds a lone surrogate (\\u{bad:04x}) under {column!r}", n_bytes)


def _require_column(column: str, known: list[str], where: str) -> None:
    if column not in known:
        raise ConfigError(_COLUMN_FIELD, f"{where} has no column {column!r}; it has: {', '.join(known) or 'none'}")
