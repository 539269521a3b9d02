"""What the loop moves to the device: a batch of rows, targets already shifted.

Shape letters: B rows of the micro-batch, T tokens of a row.
"""

from dataclasses import dataclass

import torch

NO_TARGET = -100
"""Target of a position where nothing is predicted."""


@dataclass(frozen=True)
class Batch:
    """Packed text. All tensors are int64 [B, T]."""

    tokens: torch.Tensor
    """Token ids."""
    targets: torch.Tensor
    """The id that follows each token within its segment; `NO_TARGET` where there is none."""
    positions: torch.Tensor
    """Position within the segment, from 0."""
    segments: torch.Tensor
    """Segment of each token within its row, from 0; tokens of different segments do not see each other."""
    n_targets: int
    """Positions that have a target."""

    @property
    def counts(self) -> dict[str, int]:
        """What a loss can be a sum over, by unit; the loop divides by the sum of it over a group and all ranks."""
        return {"targets": self.n_targets}

    def cut(self, pieces: int) -> "Batch":
        """The same tokens in rows of T / `pieces`: [B · pieces, T / pieces]. A piece sees nothing of the one before it."""
        if pieces == 1:
            return self
        shape = (self.tokens.shape[0] * pieces, self.tokens.shape[1] // pieces)
        segments, positions = self.segments.reshape(shape), self.positions.reshape(shape)
        goes_on = segments == segments[:, :1]
        return Batch(
            tokens=self.tokens.reshape(shape),
            targets=self.targets.reshape(shape),
            positions=torch.where(goes_on, positions - positions[:, :1], positions),
            segments=segments - segments[:, :1],
            n_targets=self.n_targets,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            n_targets=self.n_targets,
        )
