"""Prompts of a split for policies: token ids up to where the row's own completion begins, and the row's words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.data.conversations import message_text
from kajiya.data.documents import Documents, open_documents
from kajiya.data.pack import n_prompt_tokens, open_packing
from kajiya.data.shards import Split, open_split


@dataclass(frozen=True)
class Prompt:
    """What an answer is drawn to."""

    ids: tuple[int, ...]
    text: str
    """The prompt as it stands in the data, before any template."""
    completion: str | None = None
    """The row's own completion; `None` of a row without one."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Its columns that are kept for rewards (`data.keep`)."""


class Prompts:
    """The prompts of one split, in its order."""

    def __init__(self, corpus: Path, shards: Path, packed: Path, split: str) -> None:
        self._documents: Documents = open_documents(corpus, split)
        self._split: Split = open_split(shards, split)
        self._rows = _rows_of(self._documents.names, self._split.names)
        # What is too long, or leaves no room for an answer, was left out, or an error, when the rows were packed.
        self._kept = np.unique(open_packing(packed, split).examples).tolist()
        self._lengths = {index: n_prompt_tokens(self._split, index) for index in self._kept}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self._lengths[index] for index in self._kept)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a prompt."""
        return sum(self._lengths[index] for index in self._kept) / len(self)

    def __getitem__(self, place: int) -> Prompt:
        index = self._kept[place]
        ids = self._split.document(index)[: self._lengths[index]]
        row = json.loads(self._documents.text(self._rows[index]))
        completion = _text(row["completion"]) if "completion" in row else None
        return Prompt(tuple(ids.tolist()), _text(row["prompt"]), completion, row.get("row", {}))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(message_text(message) for message in value)


def _rows_of(names: Sequence[str], kept: Sequence[str]) -> list[int]:
    """Where each of the `kept` names stands in `names`, of which it is a part in the same order."""
    places, place = [], 0
    for name in kept:
        while names[place] != name:
            place += 1
        places.append(place)
        place += 1
    return places
