"""From a run of documents to tokens: text between begin and end, and structured rows rendered into examples."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kajiya.data.documents import Documents
from kajiya.data.encode import encode_texts
from kajiya.data.examples import Example
from kajiya.data.parts import Encoded
from kajiya.errors import DataError


@dataclass(frozen=True)
class TextEncoder:
    """Each document becomes begin-of-text + ids + end-of-text."""

    documents: Documents
    encoder: Any
    dtype: np.dtype
    bos_id: int
    eos_id: int

    def __call__(self, start: int, stop: int) -> Encoded:
        """The documents from `start` to before `stop`; `DataError` where text is encoded to one of the two."""
        encoded = encode_texts(self.encoder, [self.documents.text(index) for index in range(start, stop)])
        lengths = np.array([len(ids) + 2 for ids in encoded], dtype=np.int64)
        tokens = np.empty(lengths.sum(), dtype=self.dtype)
        ends = np.cumsum(lengths)
        for ids, end in zip(encoded, ends.tolist(), strict=True):
            tokens[end - len(ids) - 2] = self.bos_id
            tokens[end - len(ids) - 1 : end - 1] = ids
            tokens[end - 1] = self.eos_id
        special = (tokens == self.bos_id) | (tokens == self.eos_id)
        if int(special.sum()) != 2 * len(lengths):
            self._refuse(encoded, start)
        return Encoded(tokens, lengths)

    def _refuse(self, encoded: list[np.ndarray], start: int) -> None:
        special = (self.bos_id, self.eos_id)
        bad = next(index for index, ids in enumerate(encoded, start) if np.isin(ids, special).any())
        raise DataError(
            f"{self.documents.names[bad]}: its text is encoded to the special token {special[0]} or {special[1]}, "
            "which marks where documents begin and end.\nChoose another tokenizer, or train one."
        )


@dataclass(frozen=True)
class RowsEncoder:
    """Each document is a row, a JSON object, which is rendered into an example of `segments` sequences."""

    documents: Documents
    render: Callable[[Any], Example]
    dtype: np.dtype
    segments: int

    def __call__(self, start: int, stop: int) -> Encoded:
        """The rows from `start` to before `stop`; a `DataError` of the rendering names the row."""
        examples = [self._example(index) for index in range(start, stop)]
        sequences = [sequence for example in examples for sequence in example.segments]
        labels = [example.label for example in examples]
        return Encoded(
            tokens=np.concatenate([sequence.ids for sequence in sequences]).astype(self.dtype),
            lengths=np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64),
            weights=np.concatenate([sequence.weights for sequence in sequences]).astype(np.float32),
            labels=None if labels[0] is None else np.array(labels),
        )

    def _example(self, index: int) -> Example:
        try:
            example = self.render(json.loads(self.documents.read(index)))
        except DataError as problem:
            raise DataError(f"{self.documents.names[index]}: {problem}") from problem
        assert len(example.segments) == self.segments, "an example of another kind"
        return example
