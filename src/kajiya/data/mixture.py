"""Rows of several sources together, drawn by weight: a function of the rows' names and the seed, none taken twice."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kajiya.config.digest import digest
from kajiya.data.entries import Document, Entry, Omitted
from kajiya.data.origin import Origin
from kajiya.errors import ConfigError

NOT_DRAWN = "not drawn for the mixture"
_FIELD = "data.source.options.parts"


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    label: str
    """Stands before the names of its rows."""
    origin: Origin
    weight: float | None
    """Share of the drawn rows, relative to the others'."""
    max_rows: int | None
    """Most rows that are drawn."""


def mix(parts: Sequence[Part], seed: int, kind: str) -> Origin:
    """The rows of the parts as one source. Rows that are not drawn are `Omitted`, so that the ledger counts them.

    With weights w and n readable rows in each part (at most `max_rows`), part i gives ⌊w_i · min_j(n_j / w_j)⌋ rows: as
    many as can be had in these proportions without repeating one. They are those whose hash with the seed is lowest, so
    that a row added to the source changes few of the others.
    """
    labels = [part.label for part in parts]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"{_FIELD}[…].label", f"two parts have one label ({', '.join(labels)})")
    weighed = [part.weight is not None for part in parts]
    if any(weighed) and not all(weighed):
        raise ConfigError(
            f"{_FIELD}[…].weight", "is set for some parts and not for others", "Set it for all or for none."
        )

    def read() -> Iterator[Entry]:
        bounds = _bounds(parts, seed)
        for part, bound in zip(parts, bounds, strict=True):
            for entry in part.origin.read():
                named = replace(entry, name=f"{part.label}/{entry.name}")
                if isinstance(named, Document):
                    named = replace(named, group=None if named.group is None else f"{part.label}/{named.group}")
                    if bound is not None and _rank(named.name, seed) > bound:
                        yield Omitted(named.name, NOT_DRAWN, named.n_bytes + named.separator_bytes)
                        continue
                yield named

    def described(settings: bool) -> dict[str, Any]:
        each = [
            (part.origin.settings if settings else part.origin.facts | part.origin.form)
            | {"label": part.label, "weight": part.weight, "max_rows": part.max_rows}
            for part in parts
        ]
        return {"name": "mixture", "options": {"seed": seed, "parts": each}}

    return Origin(
        read=read,
        fingerprint=lambda: digest([part.origin.fingerprint() for part in parts]),
        settings=described(settings=True) | {"format": kind},
        facts=described(settings=False),
        form={"format": kind, "columns": {}},
        unread=tuple(f"{part.label}/{column}" for part in parts for column in part.origin.unread),
    )


def _bounds(parts: Sequence[Part], seed: int) -> list[int | None]:
    """For each part the highest hash that is drawn; `None`: every row is."""
    if all(part.weight is None and part.max_rows is None for part in parts):
        return [None] * len(parts)
    ranks = []
    for part in parts:
        found = array("Q")
        for entry in part.origin.read():
            if isinstance(entry, Document):
                found.append(_rank(f"{part.label}/{entry.name}", seed))
        ranks.append(np.frombuffer(found, dtype=np.uint64) if found else np.zeros(0, dtype=np.uint64))
    sizes = [
        len(rank) if part.max_rows is None else min(len(rank), part.max_rows)
        for part, rank in zip(parts, ranks, strict=True)
    ]
    weights = [part.weight for part in parts]
    if None not in weights:
        scale = min(size / float(weight) for size, weight in zip(sizes, weights, strict=True) if weight)
        # The part that sets the scale gives all its rows, whatever the rounding.
        sizes = [
            min(size, int(float(weight) * scale + 1e-9)) for size, weight in zip(sizes, weights, strict=True) if weight
        ]
    return [_bound(rank, size) for rank, size in zip(ranks, sizes, strict=True)]


def _bound(ranks: np.ndarray, n: int) -> int | None:
    if n >= len(ranks):
        return None
    return -1 if n == 0 else int(np.partition(ranks, n - 1)[n - 1])


def _rank(name: str, seed: int) -> int:
    """A number in [0, 2^64) for each row's name; different names have different ones but for one in 2^64."""
    raw = hashlib.blake2b(name.encode(errors="backslashreplace"), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(raw, "big")
