"""Where documents come from: each source yields, in an order that is always the same, what it could read and what not.

Text is taken exactly as it is: line ends and byte-order marks of text files stay, so that `text.encode()` is the file.
"""

import csv
import glob
import io
import os
import sys
import sysconfig
import tokenize
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kajiya.config.options import HubSource, StdlibSource, TableSource, TextSource
from kajiya.data.entries import Document as Document
from kajiya.data.entries import Entry, Unreadable, decode_entry, json_entry, row_entry
from kajiya.errors import ConfigError, DataError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_FILES_FIELD = "data.source.options.files"
_COLUMN_FIELD = "data.source.options.column"


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
                        yield json_entry(f"{file}:{number}", row, options.column)
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
                    yield row_entry(f"{file}:{number}", value, options.column)
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
            yield row_entry(name, row[options.column], options.column)


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
    return decode_entry(name, raw, encoding)


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
                yield row_entry(f"{file}:{line}", row[index].encode(errors="surrogateescape"), column)
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


def _require_column(column: str, known: list[str], where: str) -> None:
    if column not in known:
        raise ConfigError(_COLUMN_FIELD, f"{where} has no column {column!r}; it has: {', '.join(known) or 'none'}")
