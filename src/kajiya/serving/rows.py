"""The logits that a step brings, with what is always wanted of them.

Shape letters: O outputs, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Logits fp32 [O, V] of one sequence, with each row's most probable token and the logarithm of its normalizer."""

    logits: torch.Tensor
    best: list[int]
    log_sums: list[float]
    """NaN for a row that is not finite."""


def rows_of(logits_OV: torch.Tensor) -> Rows:
    """`Rows` of plain logits."""
    logits_OV = logits_OV.float()
    log_sums = torch.where(logits_OV.isfinite().all(-1), logits_OV.logsumexp(-1), torch.nan)
    return Rows(logits_OV, logits_OV.argmax(-1).tolist(), log_sums.tolist())
