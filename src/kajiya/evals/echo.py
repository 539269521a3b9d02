"""A text that an endpoint gives back with log-probabilities: which of its bytes each token stands for.

Told by the tokens themselves: servers differ in what they count in `text_offset` (a start token that the text does not have, a
letter once for each of its tokens), and some give none. Positions are bytes of the text in UTF-8.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kajiya.errors import KajiyaError

_UNREADABLE = "\ufffd"
_MOST_LETTER_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """A stretch of the text: one token, or several where the bytes of a letter are spread over them."""

    start: int
    end: int
    logprob: float | None
    """Σ log p of its tokens, nats; `None` where the endpoint gives none, as of the first token of all."""
    n_tokens: int


@dataclass(frozen=True)
class Echo:
    """A text in pieces that follow each other without a gap."""

    pieces: list[Piece]
    n_front: int
    """Tokens that the endpoint put in front of the text."""


def read_echo(text: str, tokens: Sequence[str], logprobs: Sequence[float | None]) -> Echo:
    """The pieces of a text by its echoed tokens.

    Parts of letters may be spelt out (`bytes:\\xe2\\x82`), unreadable or empty, and the space in front of a token may lack or, at
    the beginning, be too much. Raises `KajiyaError` for tokens that are not the text's.
    """
    raw = text.encode()
    n_front = next((n for n, token in enumerate(tokens) if _may_begin(text, token)), len(tokens))
    pieces: list[Piece] = []
    held: list[float | None] = []
    begin = at = least = most = 0  # the held tokens stand for bytes begin … at, and `least` to `most` more
    for token, logprob in zip(tokens[n_front:], logprobs[n_front:], strict=True):
        if at == len(raw):
            break  # an end token that the endpoint put behind the text
        spelt = _bytes_of(token, raw, at)
        if spelt is None:
            held.append(logprob)
            least += bool(token)
            most += _MOST_LETTER_BYTES * max(1, len(token))
            continue
        found = raw.find(spelt, at + least, at + most + len(spelt) + 1)
        if found < 0 or (not most and raw[at:found].strip(b" ")):
            raise _not_its_tokens(raw, at, token)
        if most and found > at and is_letter_end(raw, found):
            pieces.append(_piece(begin, found, held))
            begin, held = found, []
        held.append(logprob)
        at, least, most = found + len(spelt), 0, 0
        if at > begin and is_letter_end(raw, at):
            pieces.append(_piece(begin, at, held))
            begin, held = at, []
    if most:
        pieces.append(_piece(begin, len(raw), held))
    elif at < len(raw):
        raise _not_its_tokens(raw, at, "")
    return Echo(pieces, n_front)


def is_letter_end(raw: bytes, at: int) -> bool:
    """Whether no letter has bytes on both sides of that place."""
    return at >= len(raw) or raw[at] & 0xC0 != 0x80


def _may_begin(text: str, token: str) -> bool:
    is_part = token.startswith("bytes:") or _UNREADABLE in token
    return is_part or text.lstrip(" ").startswith(token.lstrip(" "))


def _bytes_of(token: str, raw: bytes, at: int) -> bytes | None:
    """What a token stands for, at that place of the text; `None` where it does not say."""
    spelt = token.encode()
    if raw.startswith(spelt, at) and spelt:
        return spelt
    if token.startswith("bytes:"):
        return re.sub(rb"\\x([0-9a-f]{2})", lambda byte: bytes.fromhex(byte[1].decode()), spelt[len("bytes:") :])
    if not token or _UNREADABLE in token:
        return None
    return spelt.removeprefix(b" ") if at == 0 else spelt


def _piece(start: int, end: int, logprobs: Sequence[float | None]) -> Piece:
    known = [each for each in logprobs if each is not None]
    return Piece(start, end, sum(known) if len(known) == len(logprobs) else None, len(logprobs))


def _not_its_tokens(raw: bytes, at: int, token: str) -> KajiyaError:
    there = raw[at : at + 40].decode(errors="replace")
    return KajiyaError(
        f"The endpoint's tokens are not those of the text it was given: {token!r} at byte {at}, where the text has {there!r}.\n"
        "Its tokenizer changes texts, or it spells tokens in a way of its own: evaluate the model's files instead."
    )
