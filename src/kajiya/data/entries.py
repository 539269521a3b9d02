"""What a source yields: a document, or what could not be read and why; and how bytes, strings and JSON become one."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """One document."""

    name: str
    """Relative POSIX path, or `file:line` for a row of a file. The held-out split is a hash of it."""
    text: str
    """The text; it always has a UTF-8 form."""
    n_bytes: int
    """Length of the text in UTF-8, bytes; for a UTF-8 file, its size."""
    group: str | None = None
    """Documents of one group are on the same side of the split, which is then a hash of the group's name."""


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


def decode_entry(name: str, raw: bytes, encoding: str) -> Entry:
    """The document of these bytes, decoded without any change; or which byte on which line is no text."""
    try:
        decoded = raw.decode(encoding)
        n_bytes = len(decoded.encode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return Unreadable(name, f"is not {encoding}: byte 0x{raw[error.start]:02x} on line {line}", len(raw))
    except UnicodeEncodeError:
        return Unreadable(name, f"holds lone surrogates when read as {encoding}", len(raw))
    return Document(name, decoded, n_bytes)


def row_entry(name: str, value: Any, column: str) -> Entry:
    """The document of a row whose text column holds `value`: a string, or its UTF-8 bytes."""
    if isinstance(value, bytes):
        return decode_entry(name, value, "utf-8")
    if not isinstance(value, str):
        held = "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
        return Unreadable(name, f"holds {held} under {column!r}, not text")
    try:
        return Document(name, value, len(value.encode()))
    except UnicodeEncodeError as error:
        n_bytes = len(value.encode(errors="surrogatepass"))
        bad = ord(value[error.start])
        return Unreadable(name, f"holds a lone surrogate (\\u{bad:04x}) under {column!r}", n_bytes)


def json_entry(name: str, line: bytes, column: str) -> Entry:
    """The document under the key `column` of a line's JSON object."""
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
    return row_entry(name, row[column], column)
