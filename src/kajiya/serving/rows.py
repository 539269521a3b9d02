"""The logits that a step brings, with what is always wanted of them.

Shape letters: O outputs, V vocabulary.
"""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Logits fp32 [O, V] of one sequence, with each row's most probable token and the logarithm of its normalizer.

    The logits are the runner's own memory: they hold until its next step.
    """

    whole: torch.Tensor
    """Logits of all sequences of the step; a part is taken when it is asked for, which greedy answers do not."""
    best: list[int]
    log_sums: list[float]
    """NaN for a row that is not finite."""
    best_logprobs: list[float] | None = None
    """Of each row's most probable token, where the runner brings it along."""
    first: int = 0
    """The first of these rows in `whole`."""

    @property
    def logits(self) -> torch.Tensor:
        """The logits of these rows."""
        return self.whole[self.first : self.first + len(self.best)]

    def last(self, n: int) -> "Rows":
        """The last `n` rows, of at least as many."""
        return self if n == len(self.best) else self.part(range(len(self.best) - n, len(self.best)))

    def part(self, rows: range) -> "Rows":
        """Some of the rows."""
        part = slice(rows.start, rows.stop)
        logprobs = self.best_logprobs[part] if self.best_logprobs is not None else None
        return Rows(self.whole, self.best[part], self.log_sums[part], logprobs, self.first + rows.start)


def rows_of(logits_OV: torch.Tensor) -> Rows:
    """`Rows` of plain logits."""
    logits_OV = logits_OV.float()
    log_sums = torch.where(logits_OV.isfinite().all(-1), logits_OV.logsumexp(-1), torch.nan)
    return Rows(logits_OV, logits_OV.argmax(-1).tolist(), log_sums.tolist())
