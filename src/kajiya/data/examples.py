"""What a row becomes when it is rendered: one or more sequences of token ids with a weight for every target."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One sequence."""

    ids: np.ndarray
    """Token ids, int64 [n]."""
    weights: np.ndarray
    """Weight of token i as a *target*, float32 [n]; 0: not trained. `weights[0]` is never used."""


@dataclass(frozen=True)
class Example:
    """One rendered row."""

    segments: tuple[Segment, ...]
    """text, instruction, chat, feedback, labelled: 1; preference: 2 (chosen, rejected); seq2seq: 2 (input, target)."""
    label: float | int | None = None
    """Class or value of a labelled row; 1 or 0 of feedback; margin of a preference, 0 where the row says none."""
