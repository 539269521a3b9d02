"""What a source yields: a document, a row of columns, or what could not be read and why; and how bytes become one."""

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kajiya.data.values import RowError, parse_json


@dataclass(frozen=True)
class Document:
    """One document: a text, or the canonical JSON of a row."""

    name: str
    """Relative POSIX path, or `file:line` for a row of a file. The held-out split is a hash of it."""
    text: str
    """The text; it always has a UTF-8 form."""
    n_bytes: int
    """Length of the text in UTF-8, bytes; for a UTF-8 file, its size."""
    group: str | None = None
    """Documents of one group are on the same side of the split, which is then a hash of the group's name."""
    separator_bytes: int = 0
    """Bytes of the file beside it that are of no document."""


@dataclass(frozen=True)
class Row:
    """One row of a table, under the names that its source gives the columns."""

    name: str
    """As a `Document`'s."""
    columns: Mapping[str, Any]
    """What JSON can hold, by column; `bytes` stand for text that is not valid."""
    n_bytes: int = 0
    """Size in the source, bytes; 0 where it is not known."""
    group: str | None = None
    """As a `Document`'s."""
    is_typed: bool = True
    """Whether its values have types of their own; in CSV all are text, and `1` may be a number."""


@dataclass(frozen=True)
class Unreadable:
    """A file or row that is no text."""

    name: str
    """As a `Document`'s."""
    reason: str
    """What is wrong, to be read after the name."""
    n_bytes: int = 0
    """Size of what could not be read, bytes; 0 where it is not known."""
    separator_bytes: int = 0
    """As a `Document`'s."""


@dataclass(frozen=True)
class Omitted:
    """A row that is left out on purpose, and counted."""

    name: str
    """As a `Document`'s."""
    reason: str
    """Why, as the ledger says it."""
    n_bytes: int = 0
    """As a `Document`'s."""


Entry = Document | Unreadable | Omitted
"""What a corpus is made of."""
Found = Document | Row | Unreadable
"""What a source yields."""


_MARKS = {
    b"\x1f\x8b": "packed by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def other_form(raw: bytes) -> str | None:
    """What a file is, by its first bytes, where it is no UTF-8."""
    return next((form for mark, form in _MARKS.items() if raw.startswith(mark)), None)


def decode_entry(name: str, raw: bytes, encoding: str, first_line: int = 1) -> Document | Unreadable:
    """The document of these bytes, decoded without any change; or which byte on which line is no text.

    `first_line` is the line of its file that they begin on.
    """
    try:
        decoded = raw.decode(encoding)
        n_bytes = len(decoded.encode())
    except UnicodeDecodeError as error:
        line, form = raw.count(b"\n", 0, error.start) + first_line, other_form(raw)
        reason = f"is not {encoding}: byte 0x{raw[error.start]:02x} on line {line}" + (
            f" (it is {form})" if form else ""
        )
        return Unreadable(name, reason, len(raw))
    except UnicodeEncodeError:
        return Unreadable(name, f"holds lone surrogates when read as {encoding}", len(raw))
    return Document(name, decoded, n_bytes)


def json_row(name: str, line: bytes) -> Row | Unreadable:
    """The row of a line that holds a JSON object."""
    try:
        row = parse_json(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Unreadable(name, f"is not utf-8: byte 0x{line[error.start]:02x} at {error.start}", len(line))
    except (ValueError, RecursionError) as error:
        return Unreadable(name, f"is no JSON: {error}", len(line))
    except RowError as error:
        return Unreadable(name, str(error), len(line))
    if not isinstance(row, dict):
        return Unreadable(name, f"is a JSON {type(row).__name__}, not an object with columns", len(line))
    return Row(name, row, len(line))
