"""The logits that a step brings, with what is always wanted of them.

Shape letters: O outputs, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Logits fp32 [O, V] of one sequence, with each row's most probable token and the logarithm of its normalizer.

    The logits are the runner's own memory: they hold until its next step.
    """

    logits: torch.Tensor
    best: list[int]
    log_sums: list[float]
    """NaN for a row that is not finite."""
    best_logprobs: list[float] | None = None
    """Of each row's most probable token, where the runner brings it along."""

    def last(self, n: int) -> "Rows":
        """The last `n` rows, of at least as many."""
        if n == len(self.best):
            return self
        logprobs = self.best_logprobs[-n:] if self.best_logprobs is not None else None
        return Rows(self.logits[-n:], self.best[-n:], self.log_sums[-n:], logprobs)


def rows_of(logits_OV: torch.Tensor) -> Rows:
    """`Rows` of plain logits."""
    logits_OV = logits_OV.float()
    log_sums = torch.where(logits_OV.isfinite().all(-1), logits_OV.logsumexp(-1), torch.nan)
    return Rows(logits_OV, logits_OV.argmax(-1).tolist(), log_sums.tolist())
