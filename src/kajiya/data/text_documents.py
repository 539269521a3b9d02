"""The documents of a text file that holds many: cut where a separator stands, read as a stream, and taken as they are."""

import codecs
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kajiya.data.entries import Document, Unreadable, decode_entry
from kajiya.errors import ConfigError

BLANK_LINE = "blank_line"
_READ_BYTES = 2**20
_SPLIT_ON = "data.source.options.split_on"
_LIMIT = "data.source.options.max_row_bytes"


@dataclass(frozen=True)
class Cutter:
    """Where one document ends and the next begins."""

    separator: re.Pattern[str]
    overlap: int | None
    """Characters of a separator that may stand at the end of what was read so far; `None`: those of the last line."""

    def begin(self, text: str) -> int:
        """From where on a separator is looked for once more, when there is none in `text` and more follows."""
        return text.rfind("\n") + 1 if self.overlap is None else max(0, len(text) - self.overlap)


def cutter(split_on: str) -> Cutter:
    """Cuts at `split_on`, a string, or `blank_line`: one or more lines with nothing but white space."""
    if not split_on:
        raise ConfigError(_SPLIT_ON, "is empty", "null: a file is one document; blank_line, or the separator itself.")
    if split_on == BLANK_LINE:
        return Cutter(re.compile(r"(?:\A|(?<=\n))(?:[^\S\n]*\n)+"), None)
    return Cutter(re.compile(re.escape(split_on)), len(split_on) - 1)


def documents_of(
    file: str, handle: io.BufferedIOBase, encoding: str, cut: Cutter, limit: int
) -> Iterator[Document | Unreadable]:
    """The documents of an open file, `<file>#<number>` from 1 on. Memory holds one of them, of at most `limit` bytes.

    Between two separators stands a document unless that is white space, which counts as a part of the separator; its bytes are
    told with a document beside it. A file with nothing else holds one empty document.
    """
    number, line, before = 0, 1, 0
    held: Document | Unreadable | None = None
    for piece in _pieces(handle, encoding, cut, limit):
        if piece.is_gap:
            before += piece.n_bytes
        else:
            if held is not None:
                yield replace(held, separator_bytes=before)
                before = 0
            number += 1
            held = _entry(f"{file}#{number}", piece, encoding, line)
        line += piece.n_lines
    if held is None:
        held = Document(f"{file}#1", "", 0)
    yield replace(held, separator_bytes=before)


@dataclass(frozen=True)
class _Piece:
    """What stands between two places of a file."""

    text: str
    """Bytes that are no text are surrogates in it; nothing of what is not to be read."""
    n_bytes: int
    """In UTF-8; those that are no text as they are."""
    n_lines: int
    is_gap: bool
    problem: str | None = None
    """Why it is not to be read."""


def _pieces(handle: io.BufferedIOBase, encoding: str, cut: Cutter, limit: int) -> Iterator[_Piece]:
    """All of a file, in order: documents, and what stands between them."""
    text, start = "", 0
    """What was read and not yet given out, and from where on no separator was looked for."""
    n_left, n_lines = 0, 0
    """Of a document that is longer than `limit`: bytes and lines that are no longer held."""
    for more in _decoded(handle, encoding):
        if isinstance(more, _Piece):
            lost = n_left + _size(text) + more.n_bytes
            reason = f"{more.problem}, and the rest of the file with it, {lost:,} bytes"
            yield replace(more, n_bytes=lost, problem=reason)
            return
        text, at = text + more, 0
        while (match := cut.separator.search(text, start)) is not None:
            yield from _document(text[at : match.start()], n_left, n_lines, limit)
            yield _Piece("", _size(match[0]), match[0].count("\n"), is_gap=True)
            at = start = match.end()
            n_left = n_lines = 0
        text = text[at:]
        start = cut.begin(text)
        if n_left or len(text) > limit:
            # One character before stays, by which a separator at the beginning of a line is known.
            keep = max(0, start - 1)
            if cut.overlap is None and len(text) - keep > _READ_BYTES:
                keep = len(text) - 1  # in the midst of a long line
            gone, text = text[:keep], text[keep:]
            n_left, n_lines, start = n_left + _size(gone), n_lines + gone.count("\n"), max(1, start - keep)
    yield from _document(text, n_left, n_lines, limit)


def _document(text: str, n_left: int, n_lines: int, limit: int) -> Iterator[_Piece]:
    n_bytes = n_left + _size(text)
    n_lines += text.count("\n")
    if n_bytes > limit:
        reason = f"is a document of {n_bytes:,} bytes, longer than {_LIMIT}={limit}"
        yield _Piece("", n_bytes, n_lines, is_gap=False, problem=reason)
    elif text:
        yield _Piece(text, n_bytes, n_lines, is_gap=not text.strip())


def _decoded(handle: io.BufferedIOBase, encoding: str) -> Iterator[str | _Piece]:
    """The text of a file, a part at a time; where it cannot be read on, last a piece that says why."""
    # Bytes that are no text become surrogates, and are then refused document by document.
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    is_last = False
    while not is_last:
        try:
            raw = handle.read(_READ_BYTES)
        except OSError as error:
            n_bytes = os.fstat(handle.fileno()).st_size - handle.tell()
            yield _Piece("", n_bytes, 0, is_gap=False, problem=f"cannot be read on ({error.strerror or error})")
            return
        is_last = not raw
        try:
            yield decoder.decode(raw, is_last)
        except UnicodeDecodeError as error:
            n_bytes = len(error.object)
            while more := handle.read(_READ_BYTES):
                n_bytes += len(more)
            yield _Piece("", n_bytes, 0, is_gap=False, problem=f"is not {encoding} ({error.reason})")
            return


def _size(text: str) -> int:
    """Bytes of UTF-8; a surrogate that stands for a byte is one."""
    try:
        return len(text.encode(errors="surrogateescape"))
    except UnicodeEncodeError:
        return len(text.encode(errors="surrogatepass"))


def _entry(name: str, piece: _Piece, encoding: str, line: int) -> Document | Unreadable:
    """The document, which begins on that line of its file, or what is wrong with it."""
    if piece.problem is not None:
        return Unreadable(name, piece.problem, piece.n_bytes)
    try:
        piece.text.encode()
    except UnicodeEncodeError:
        problem = f"holds lone surrogates when read as {encoding}"
        try:
            found = decode_entry(name, piece.text.encode(encoding, "surrogateescape"), encoding, first_line=line)
        except UnicodeEncodeError:
            return Unreadable(name, problem, piece.n_bytes)
        return found if isinstance(found, Unreadable) else Unreadable(name, problem, piece.n_bytes)
    return Document(name, piece.text, piece.n_bytes)
