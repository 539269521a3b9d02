"""Where rows come from: each source yields, in an order that is always the same, what it could read and what not.

Text is taken exactly as it is: line ends and byte-order marks of text files stay, so that `text.encode()` is the file.
"""

import csv
import glob
import io
import os
import re
import sys
import sysconfig
import tokenize
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from kajiya.config.options import LinesSource, StdlibSource, TableSource, TextSource
from kajiya.data.entries import Document as Document
from kajiya.data.entries import Found, Row, Unreadable, decode_entry, json_row, other_form
from kajiya.data.text_documents import cutter, documents_of
from kajiya.data.values import RowError
from kajiya.errors import ConfigError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_HEAD_BYTES = 512
_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")
"""How a file begins that holds its rows in one JSON array."""
_FILES_FIELD = "data.source.options.files"


SourceFile = tuple[str, Path]
"""Name within the source, and where the file is."""


# ---------------------------------------------------------------- files


def stdlib(options: StdlibSource) -> Iterator[Found]:
    """Every `.py` file of the standard library (or of `root`) outside site-packages and test folders."""
    yield from python_files(stdlib_files(options))


def python_files(files: Iterable[SourceFile]) -> Iterator[Found]:
    """The files of Python source as documents; what is not UTF-8 cannot be read, and its own coding is named."""
    for name, path in files:
        entry = _read_text(name, path, "utf-8")
        yield _with_declared_coding(entry, path) if isinstance(entry, Unreadable) else entry


def text(options: TextSource) -> Iterator[Found]:
    """Every file that the glob matches, whole, or the documents that it is cut into at `split_on`."""
    try:
        "".encode(options.encoding)
    except LookupError as error:
        raise ConfigError(
            "data.source.options.encoding", f"{options.encoding!r} is no text encoding that Python knows"
        ) from error
    cut = None if options.split_on is None else cutter(options.split_on)
    for name, path in matching_files(options.files):
        if cut is None:
            yield _read_text(name, path, options.encoding)
            continue
        try:
            handle = path.open("rb")
        except OSError as error:
            yield not_opened(name, path, error)
            continue
        with handle:
            yield from documents_of(name, handle, options.encoding, cut, options.max_row_bytes)


def jsonl(options: LinesSource) -> Iterator[Found]:
    """One row a line: its JSON object. Blank lines are no rows; memory holds one line, of at most `max_row_bytes`."""
    for file, path in matching_files(options.files):
        try:
            with path.open("rb") as handle:
                if problem := _other_form(handle.read(_HEAD_BYTES)):
                    yield Unreadable(file, problem, path.stat().st_size)
                    continue
                handle.seek(0)
                for number, line, n_bytes in _lines(handle, options.max_row_bytes):
                    name = f"{file}:{number}"
                    if n_bytes > options.max_row_bytes:
                        limit = f"data.source.options.max_row_bytes={options.max_row_bytes}"
                        yield Unreadable(name, f"is a line of {n_bytes} bytes, longer than {limit}", n_bytes)
                        continue
                    row = line.removeprefix(BOM_UTF8) if number == 1 else line
                    if row.strip():
                        yield json_row(name, row)
        except OSError as error:
            yield not_opened(file, path, error)


def _other_form(head: bytes, *, is_jsonl: bool = True) -> str | None:
    """What a file of rows is instead, by how it begins, and what would make rows of it."""
    form = other_form(head)
    if form == "UTF-16":
        return "is UTF-16: write it as UTF-8, for example by iconv -f UTF-16 -t UTF-8"
    if form is not None:
        return f"is {form}: unpack it first"
    if is_jsonl and _ARRAY.match(head.removeprefix(BOM_UTF8)):
        return "is one JSON array, not a row a line: write a line for each, for example by jq -c '.[]'"
    return None


def _lines(handle: io.BufferedIOBase, limit: int) -> Iterator[tuple[int, bytes, int]]:
    """Number, content and length of each line; of one longer than `limit`, no content."""
    number = 0
    while line := handle.readline(limit + 1):
        number += 1
        n_bytes, ended = len(line), line.endswith(b"\n")
        if n_bytes > limit:
            line = b""
            while not ended and (more := handle.readline(2**20)):
                n_bytes, ended = n_bytes + len(more), more.endswith(b"\n")
        yield number, line, n_bytes


def csv_rows(options: TableSource) -> Iterator[Found]:
    """One row a record, named by the line on which it begins; the first record holds the column names."""
    # The module's own limit (128 KiB a field) would refuse long documents.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    for file, path in matching_files(options.files):
        try:
            with path.open("rb") as raw:
                problem = _other_form(raw.read(_HEAD_BYTES), is_jsonl=False)
            if problem:
                yield Unreadable(file, problem, path.stat().st_size)
                continue
            with _open_csv(path) as handle:
                yield from _csv_file(file, path, handle)
        except OSError as error:
            yield not_opened(file, path, error)


def _open_csv(path: Path) -> io.TextIOWrapper:
    # Undecodable bytes become surrogates and are then refused row by row, not file by file.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_file(file: str, path: Path, handle: io.TextIOBase) -> Iterator[Found]:
    reader = csv.reader(handle, strict=True)
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        try:
            require_distinct(header)
        except RowError as error:
            yield Unreadable(file, str(error), path.stat().st_size)
            return
        while True:
            line = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if not row:
                continue
            name, raw = f"{file}:{line}", [field.encode(errors="surrogateescape") for field in row]
            n_bytes = sum(map(len, raw)) + len(raw) - 1
            if len(row) != len(header):
                yield Unreadable(name, f"has {len(row)} fields, the header has {len(header)}", n_bytes)
            else:
                columns = {
                    key: field if field.isascii() else bytes_
                    for key, field, bytes_ in zip(header, row, raw, strict=True)
                }
                yield Row(name, columns, n_bytes, is_typed=False)
    except csv.Error as error:
        # Where a quote is never closed, no later record of the file can be told apart; their bytes are counted all the same.
        with _open_csv(path) as again:
            n_bytes = sum(len(each.encode(errors="surrogateescape")) for each in islice(again, line - 1, None))
        reason = f"is broken CSV, and the rest of the file with it, {n_bytes:,} bytes: {error}"
        yield Unreadable(f"{file}:{line}", reason, n_bytes)


def require_distinct(columns: Sequence[str]) -> None:
    """Raise `RowError` where two columns of a table have one name."""
    for name in set(columns):
        if columns.count(name) > 1:
            raise RowError(f"has two columns of the name {name!r}; name each of them otherwise")


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


# ---------------------------------------------------------------- one file


def _name(path: Path, root: Path) -> str:
    """Relative POSIX path; bytes of a file name that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", errors="backslashreplace")


def not_opened(name: str, path: Path, error: OSError) -> Unreadable:
    """What is said of a file that cannot be opened or read; all its bytes count as lost.

    Those of a vanished file nobody knows. It stops the work in any case: the files are others than those that were listed.
    """
    if isinstance(error, FileNotFoundError):
        return Unreadable(name, "vanished: it was listed and is no longer there")
    try:
        n_bytes = path.stat().st_size
    except OSError:
        n_bytes = 0
    return Unreadable(name, f"cannot be read: {error.strerror or error}", n_bytes)


def _read_text(name: str, path: Path, encoding: str) -> Document | Unreadable:
    try:
        raw = path.read_bytes()
    except OSError as error:
        return not_opened(name, path, error)
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
