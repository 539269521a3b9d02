"""From a run of documents to tokens: text between begin and end, and structured rows rendered into examples."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kajiya.data.documents import Documents
from kajiya.data.encode import BulkEncoder
from kajiya.data.examples import Example
from kajiya.data.parts import Encoded
from kajiya.errors import DataError

RenderMany = Callable[[Iterable[tuple[str, str]]], Iterator[Any]]
"""From (name, row as JSON) to an `Example`, or to something else that says, as text, what is wrong with the row."""


@dataclass(frozen=True)
class TextEncoder:
    """Each document becomes begin-of-text + ids + end-of-text."""

    documents: Documents
    bulk: BulkEncoder
    dtype: np.dtype
    bos_id: int
    eos_id: int

    def __call__(self, start: int, stop: int) -> Encoded:
        """The documents from `start` to before `stop`; `DataError` where text is encoded to one of the two."""
        ids, offsets = self.bulk.encode([self.documents.text(index) for index in range(start, stop)])
        special = (ids == self.bos_id) | (ids == self.eos_id)
        if special.any():
            bad = start + int(np.searchsorted(offsets, np.flatnonzero(special)[0], side="right")) - 1
            raise DataError(
                f"{self.documents.names[bad]}: its text is encoded to the special token {self.bos_id} or {self.eos_id}, "
                "which marks where documents begin and end.\nChoose another tokenizer, or train one."
            )
        # Two tokens more for each document: where its ids go is where they were, and two on for each one before it.
        number = np.arange(len(offsets) - 1)
        tokens = np.empty(len(ids) + 2 * len(number), dtype=self.dtype)
        is_id = np.ones(len(tokens), dtype=np.bool_)
        is_id[offsets[:-1] + 2 * number] = False
        is_id[offsets[1:] + 2 * number + 1] = False
        tokens[is_id] = ids
        tokens[offsets[:-1] + 2 * number] = self.bos_id
        tokens[offsets[1:] + 2 * number + 1] = self.eos_id
        return Encoded(tokens, np.diff(offsets) + 2)


@dataclass(frozen=True)
class RowsEncoder:
    """Each document is a row, a JSON object, which is rendered into an example of `segments` sequences."""

    documents: Documents
    render: RenderMany
    dtype: np.dtype
    segments: int
    drops: bool
    """Whether a row that cannot be rendered is left out, counted; otherwise it stops the work."""

    def __call__(self, start: int, stop: int) -> Encoded:
        """The rows from `start` to before `stop`."""
        rows = ((self.documents.names[index], self.documents.text(index)) for index in range(start, stop))
        examples: list[Example] = []
        dropped: dict[int, str] = {}
        for index, rendered in enumerate(self.render(rows), start):
            if isinstance(rendered, Example):
                assert len(rendered.segments) == self.segments, "an example of another kind"
                examples.append(rendered)
            elif self.drops:
                dropped[index] = str(rendered)
            else:
                raise DataError(
                    f"{rendered}\nMend or remove it, or set data.on_unreadable=drop to leave such rows out, counted."
                )
        sequences = [sequence for example in examples for sequence in example.segments]
        labels = [example.label for example in examples if example.label is not None]
        assert len(labels) in (0, len(examples)), "some rows have a label and some have none"
        return Encoded(
            tokens=_joined((sequence.ids for sequence in sequences), self.dtype),
            lengths=np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64),
            weights=_joined((sequence.weights for sequence in sequences), np.dtype(np.float32)),
            labels=np.array(labels) if labels else None,
            dropped=dropped,
        )


def _joined(arrays: Iterable[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The arrays one behind the other, in that type without a copy in a larger one."""
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays], dtype=dtype, casting="unsafe")
