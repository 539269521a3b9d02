"""Samples of fine-tuning as every peer reads them: ids and labels, in the steps that Kajiya's packed rows put them in.

NumPy only, so that a peer in an environment of its own can read them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NO_TARGET = -100


@dataclass(frozen=True)
class Sample:
    """One sequence; of a preference pair, one of its two."""

    ids: np.ndarray
    """Token ids, int64 [n]."""
    labels: np.ndarray
    """The id where it is trained, else `NO_TARGET`; int64 [n], not shifted."""

    @property
    def prompt_length(self) -> int:
        """Tokens in front of the first that is trained."""
        return int(np.argmax(self.labels != NO_TARGET))


def save_samples(steps: Sequence[Sequence[Sample]], path: Path) -> None:
    """Write the samples of each step."""
    samples = [sample for step in steps for sample in step]
    np.savez(
        path,
        ids=np.concatenate([sample.ids for sample in samples]).astype(np.int32),
        labels=np.concatenate([sample.labels for sample in samples]).astype(np.int32),
        lengths=np.array([len(sample.ids) for sample in samples]),
        steps=np.array([len(step) for step in steps]),
    )


def read_samples(path: str) -> list[list[Sample]]:
    """The samples of each step. Of preference pairs, a chosen one and its rejected one follow each other."""
    held = np.load(path)
    ends = np.cumsum(held["lengths"])[:-1]
    parts = zip(np.split(held["ids"], ends), np.split(held["labels"], ends), strict=True)
    samples = iter([Sample(ids.astype(np.int64), labels.astype(np.int64)) for ids, labels in parts])
    return [[next(samples) for _ in range(n)] for n in held["steps"].tolist()]


def samples_of(batch: Any) -> list[Sample]:
    """The samples of a batch of Kajiya's packed rows, in their order; what fills a row up is none."""
    rows = getattr(batch, "rows", batch)
    found = []
    for tokens, targets, segments in zip(rows.tokens.numpy(), rows.targets.numpy(), rows.segments.numpy(), strict=True):
        for number in range(int(segments.max()) + 1):
            part = segments == number
            # Targets are shifted: each stands one place before its token.
            labels = np.concatenate([[NO_TARGET], targets[part][:-1]])
            if (labels != NO_TARGET).any():
                found.append(Sample(tokens[part], labels))
    return found


def padded(samples: Sequence[Sample], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, labels and whether a token is one, each [samples, longest], padded on the right."""
    shape = (len(samples), max(len(sample.ids) for sample in samples))
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, NO_TARGET, dtype=np.int64)
    is_token = np.zeros(shape, dtype=bool)
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        ids[row, :n], labels[row, :n], is_token[row, :n] = sample.ids, sample.labels, True
    return ids, labels, is_token
