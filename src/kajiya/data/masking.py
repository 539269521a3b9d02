"""Masked-LM rows: some tokens of each row are hidden, and the model says what they were (BERT)."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.text_rows import Rows


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden (Devlin et al., arXiv:1810.04805, section 3.1)."""

    mask_id: int
    """The mask token."""
    vocab_size: int
    """Ids of random tokens lie below it."""
    special_ids: tuple[int, ...]
    """Tokens that are never hidden, and never stand in for another."""
    fraction: float = 0.15
    """Share of a row's tokens that are predicted: of them 80 % become the mask, 10 % a random token, 10 % stay."""


class MaskedRows:
    """Rows of text with some tokens hidden; which, is a function of (seed, place) alone."""

    def __init__(self, rows: Rows, masking: Masking, seed: int) -> None:
        self.rows = rows
        self.masking = masking
        self.seed = seed

    @property
    def n(self) -> int:
        """Rows in a turn."""
        return self.rows.n

    def epoch(self, row: int) -> int:
        """As `Rows`'s."""
        return self.rows.epoch(row)

    def identity(self) -> dict[str, int]:
        """As `Rows`'s."""
        return self.rows.identity()

    def documents(self, place: int) -> list[int]:
        """As `Rows`'s."""
        return self.rows.documents(place)

    def heaviest(self, n: int) -> np.ndarray:
        """As `Rows`'s."""
        return self.rows.heaviest(n)

    def batch(self, places: np.ndarray) -> Batch:
        """The rows at these places; the targets are the hidden tokens, in their own place."""
        whole: Batch = self.rows.batch(places)
        hidden, shown = [], []
        for place, ids in zip(places.tolist(), whole.tokens.numpy(), strict=True):
            chosen, replaced = self._hide(place, ids)
            hidden.append(np.where(chosen, ids, NO_TARGET))
            shown.append(replaced)
        targets = np.stack(hidden)
        return replace(
            whole,
            tokens=torch.from_numpy(np.stack(shown)),
            targets=torch.from_numpy(targets),
            n_targets=int((targets != NO_TARGET).sum()),
            is_causal=False,
        )

    def _hide(self, place: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a row are targets (bool [T]), and the row as the model sees it (int64 [T])."""
        masking = self.masking
        philox = np.random.Philox(key=np.array([self.seed % 2**64, place], dtype=np.uint64))
        choice, way, other = philox.random_raw(3 * len(ids)).reshape(3, -1) / 2.0**64
        ordinary = ~np.isin(ids, masking.special_ids)
        chosen = ordinary & (choice < masking.fraction)
        if not chosen.any() and ordinary.any():
            # A row without a target would be lost: the token that was nearest to being chosen is.
            chosen[np.argmin(np.where(ordinary, choice, 2.0))] = True
        replacing = np.setdiff1d(np.arange(masking.vocab_size), masking.special_ids)
        random = replacing[(other * len(replacing)).astype(np.int64)]
        shown = np.where(way < 0.8, masking.mask_id, np.where(way < 0.9, random, ids))
        return chosen, np.where(chosen, shown, ids)
