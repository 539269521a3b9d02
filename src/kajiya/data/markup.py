"""Text with markup to token ids: special tokens stand only where a template says them, never in what people wrote.

A text comes in chunks, each with the weight of its tokens as targets. Each chunk is encoded by itself: so the ids of a prompt
are always the beginning of the ids of the conversation that goes on from it, whatever the tokenizer would merge across.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kajiya.data.encode import BulkEncoder, PlainBulkEncoder, fastest_encoder
from kajiya.data.examples import Segment
from kajiya.errors import DataError

_SHORT = 24
_MAX_KNOWN = 32_768


Piece = tuple[bool, str]
"""A text to be encoded, and whether a word begins with it."""
Atom = int | Piece
"""A special token's id, or a text."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of text that is encoded by itself."""

    text: str
    weight: float
    """Weight of its tokens as targets."""
    is_literal: bool = False
    """Special tokens' names within it are plain text."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One sequence before it is encoded."""

    chunks: Sequence[Chunk]
    names: Mapping[int, str] | None = None
    """For each private character of the chunks, the special token's name that somebody wrote (`Markup.shield`)."""
    lead: tuple[int, ...] = ()
    """Ids put before it, never targets."""
    close: tuple[int, ...] = ()
    """Ids put behind it."""
    close_weight: float = 0.0


class Markup:
    """A tokenizer as chunks need it: special tokens found by their names, everything between them encoded as plain text.

    Raises `DataError` for a tokenizer without a fast form.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            kind, name = type(tokenizer).__name__, tokenizer.name_or_path
            raise DataError(
                f"the tokenizer {name!r} is a {kind}, which has no fast form (tokenizer.json)\n"
                "Convert it, or choose a model that brings one."
            )
        added = tokenizer.added_tokens_decoder
        self.specials = {token.content: int(number) for number, token in added.items() if token.special}
        self._pattern = _pattern([token for token in added.values() if token.special])
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        self._prefix = _remove_prefix(spec)
        begin = _plain(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
        inner = begin if self._prefix is None else _plain(Tokenizer.from_str(json.dumps(spec)))
        self._plain = {True: begin, False: inner}
        self._bulk: dict[bool, BulkEncoder] = {key: PlainBulkEncoder(each) for key, each in self._plain.items()}
        self._known: dict[Piece, np.ndarray] = {}
        self._closers = tuple(self.specials)

    def closed_end(self, text: str, start: int, end: int) -> int | None:
        """Where the special token ends that closes `text[start:end]`, white space behind it aside; `None`: none does."""
        said = text[start:end].rstrip()
        return start + len(said) if self._closers and said.endswith(self._closers) else None

    def shield(self, value: Any) -> tuple[Any, dict[int, str] | None]:
        """The value with special tokens' names in its texts replaced by private characters, and what each stands for."""
        if self._pattern is None or not _holds(value, self._pattern):
            return value, None
        used = set(json.dumps(value, ensure_ascii=False))
        free = (
            number
            for plane in (0xF0000, 0x100000)
            for number in range(plane, plane + 65_000)
            if chr(number) not in used
        )
        numbers: dict[str, int] = {}

        def private(match: re.Match[str]) -> str:
            if match[0] not in numbers:
                numbers[match[0]] = next(free)
            return chr(numbers[match[0]])

        return _replaced(value, self._pattern, private), {number: name for name, number in numbers.items()}

    def quicken(self, sample: Sequence[str]) -> None:
        """From here on take the fastest encoder that gives the same ids on hard text and on the sample."""
        inner = fastest_encoder(self._plain[False], sample).bulk
        self._bulk = {
            True: inner if self._prefix is None else fastest_encoder(self._plain[True], sample).bulk,
            False: inner,
        }

    def encode(self, drafts: Sequence[Draft]) -> list[Segment]:
        """Ids and weights of each draft, encoded together on all cores. Several threads may do so at a time."""
        known = self._known
        planned = [self._atoms(draft) for draft in drafts]
        new: dict[Piece, None] = {}
        for atoms in planned:
            new.update((atom, None) for atom, _ in atoms if not isinstance(atom, int) and atom not in known)
        found = self._encode_all(list(new))
        made = [_segment(draft, atoms, known, found) for draft, atoms in zip(drafts, planned, strict=True)]
        if len(known) > _MAX_KNOWN:
            # Another, not an empty one: who encodes beside goes on with what it has found known.
            known = self._known = {}
        # Copies: a view would keep the ids of everything that was encoded with it.
        known.update((piece, ids.copy()) for piece, ids in found.items() if len(piece[1]) <= _SHORT)
        return made

    def _encode_all(self, pieces: Sequence[Piece]) -> dict[Piece, np.ndarray]:
        found: dict[Piece, np.ndarray] = {}
        for begins, bulk in self._bulk.items():
            mine = [piece for piece in pieces if piece[0] is begins]
            ids, offsets = bulk.encode([text for _, text in mine])
            bounds = offsets.tolist()
            found |= {piece: ids[bounds[i] : bounds[i + 1]] for i, piece in enumerate(mine)}
        return found

    def _atoms(self, draft: Draft) -> list[tuple[Atom, float]]:
        """Special tokens by id, and the plain texts between them; each text says whether a word begins with it."""
        atoms: list[tuple[Atom, float]] = []
        has_prefix, begins = self._prefix is not None, self._prefix is not None

        def plain(text: str, weight: float) -> None:
            nonlocal begins
            if text:
                atoms.append(((begins, text.translate(draft.names) if draft.names else text), weight))  # type: ignore[arg-type]
                begins = False

        for chunk in draft.chunks:
            at = 0
            if self._pattern is not None and not chunk.is_literal:
                for match in self._pattern.finditer(chunk.text):
                    plain(chunk.text[at : match.start()], chunk.weight)
                    atoms.append((self.specials[match[match.lastgroup or 0]], chunk.weight))
                    begins = has_prefix and self._prefix == "always"
                    at = match.end()
            plain(chunk.text[at:], chunk.weight)
        return atoms


def _segment(
    draft: Draft,
    atoms: Sequence[tuple[Atom, float]],
    known: Mapping[Piece, np.ndarray],
    found: Mapping[Piece, np.ndarray],
) -> Segment:
    parts: list[Sequence[int] | np.ndarray] = [draft.lead]
    weights = [0.0]
    for atom, weight in atoms:
        parts.append((atom,) if isinstance(atom, int) else found[atom] if atom in found else known[atom])
        weights.append(weight)
    parts.append(draft.close)
    weights.append(draft.close_weight)
    lengths = [len(part) for part in parts]
    ids = np.empty(sum(lengths), dtype=np.int64)
    np.concatenate(parts, out=ids, casting="unsafe")
    return Segment(ids, np.repeat(np.array(weights, dtype=np.float32), lengths))


# ---------------------------------------------------------------- the tokenizer's parts


def _plain(encoder: Any) -> Any:
    """The encoder without padding, cutting, and special tokens."""
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _pattern(tokens: Sequence[Any]) -> re.Pattern[str] | None:
    """Finds special tokens by name, the longest first, with the white space that each takes with it."""
    if not tokens:
        return None
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for token in tokens:
        kinds.setdefault((token.lstrip, token.rstrip), []).append(token.content)
    parts = []
    for number, ((lstrip, rstrip), names) in enumerate(kinds.items()):
        either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        before, behind = (r"\s*" if strips else "" for strips in (lstrip, rstrip))
        parts.append(f"{before}(?P<t{number}>{either}){behind}")
    return re.compile("|".join(parts))


def _remove_prefix(spec: dict[str, Any]) -> str | None:
    """Take the space that a tokenizer puts before a text out of its description; says where it puts it: first or always.

    `first`: at the head of the text; `always`: behind every special token too; `None`: nowhere.
    """
    found: str | None = None
    waiting: list[tuple[dict[str, Any], str]] = [(spec, key) for key in ("normalizer", "pre_tokenizer")]
    while waiting:
        holder, key = waiting.pop()
        part = holder[key]
        if not isinstance(part, dict):
            continue
        for name in ("normalizers", "pretokenizers"):
            waiting += [({"part": inner}, "part") for inner in part.get(name, []) if inner["type"] != "Prepend"]
            if any(inner["type"] == "Prepend" for inner in part.get(name, [])):
                part[name] = [inner for inner in part[name] if inner["type"] != "Prepend"]
                found = "always"
        if part["type"] == "Prepend":
            holder[key], found = None, "always"
        elif part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            found = part.get("prepend_scheme", "always")
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel" and part["add_prefix_space"]:
            part["add_prefix_space"], found = False, "always"
    return found


def _holds(value: Any, pattern: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(_holds(part, pattern) for pair in value.items() for part in pair)
    return isinstance(value, Sequence) and any(_holds(item, pattern) for item in value)


def _replaced(value: Any, pattern: re.Pattern[str], private: Any) -> Any:
    if isinstance(value, str):
        return pattern.sub(private, value)
    if isinstance(value, Mapping):
        return {_replaced(key, pattern, private): _replaced(inner, pattern, private) for key, inner in value.items()}
    return [_replaced(item, pattern, private) for item in value] if isinstance(value, Sequence) else value
