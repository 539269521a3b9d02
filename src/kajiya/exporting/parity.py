"""Whether two models compute the same: KL, top-1, greedy continuation and perplexity on the same rows, held to set tolerances."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET
from kajiya.errors import ParityError
from kajiya.exporting.evidence import LOGITS, Evidence, nll_of, perplexity_of


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from its parent; `None`: not held to."""

    max_difference: float | None = None
    """Largest difference of a logit."""
    kl: float | None = None
    """Mean KL divergence from the parent, nats per token."""
    top1: float | None = None
    """Least share of positions whose most probable token is the same, but for ties (see `distance`)."""
    greedy: float | None = None
    """Least share of the tokens of the parent's greedy continuation that the result would go on with too, but for ties."""
    perplexity: float | None = None
    """Largest change of the perplexity, over the parent's."""


_HALF = Tolerance(kl=1e-3, top1=0.995, greedy=0.98, perplexity=0.01)
"""A perplexity may move by ten times what KL may, 0.01 nats. Greedy continuation is seen on a tenth of the tokens that
top-1 is, so that chance alone moves its share some three times as far."""
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    # Where no logit moves by more than 1e-4, no log-probability moves by more than 2e-4, and no token that leads by that is lost.
    torch.float32: Tolerance(max_difference=1e-4, greedy=1.0, perplexity=2e-4),
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
}
_SCORE_SHARE = 0.05
"""Of a head of one number in 16 bits, which has neither KL nor top-1: largest difference, over the largest number."""


@dataclass(frozen=True)
class Distance:
    """How far a model is from the parent."""

    max_difference: float
    kl: float
    top1: float
    greedy: float | None
    """Share of the tokens of the parent's greedy continuation that the model would go on with too; of causal models alone."""
    perplexity: float | None
    """The model's own; `None` where the head predicts no text that is known."""


@dataclass(frozen=True)
class Parity:
    """What was measured of a result beside its parent, on the same rows."""

    dtype: str
    n_tokens: int
    n_continued: int
    """Tokens of the parent's greedy continuations."""
    max_difference: float
    kl: float
    top1: float
    greedy: float | None
    """As `Distance`'s."""
    perplexity: float | None
    parent_perplexity: float | None
    rounding: Distance | None
    """How far the parent is from itself when it is rounded as the result is; the tolerance holds for what comes on top of it."""
    tolerance: Tolerance
    allowed: Tolerance
    """What the result is held to: the tolerance with the parent's own rounding on top, of shares with three standard errors."""

    def problems(self) -> list[str]:
        """What is past what is allowed, in words."""
        limit, found = self.allowed, []
        if not self.max_difference < float("inf"):
            found.append("logits that are no numbers")
        if limit.max_difference is not None and self.max_difference > limit.max_difference:
            found.append(f"a logit differs by {self.max_difference:.2g} (allowed: {limit.max_difference:.2g})")
        if limit.kl is not None and self.kl > limit.kl:
            found.append(f"KL {self.kl:.2g} nats per token (allowed: {limit.kl:.2g})")
        if limit.top1 is not None and self.top1 < limit.top1:
            found.append(f"the most probable token is the same at {self.top1:.2%} (least: {limit.top1:.2%})")
        if limit.greedy is not None and self.greedy is not None and self.greedy < limit.greedy - 1e-9:
            found.append(
                f"it goes on greedily as its parent does at {self.greedy:.2%} of {self.n_continued} tokens (least: "
                f"{limit.greedy:.2%})"
            )
        change = _change(self.perplexity, self.parent_perplexity)
        if limit.perplexity is not None and change is not None and not change <= limit.perplexity:
            found.append(
                f"perplexity {self.perplexity:.4g}, the parent's {self.parent_perplexity:.4g} (allowed: a change of "
                f"{limit.perplexity:.2%})"
            )
        return found


def compare(
    parent: Any,
    result: Any,
    evidence: Evidence,
    *,
    stored: torch.dtype = torch.float32,
    rounding: Distance | None = None,
) -> Parity:
    """Both models on the same evidence, logits of one row at a time.

    The tolerance is that of the dtype in which the result computes, or, where its weights were rounded to a coarser one (`stored`),
    of that. `rounding` is the parent's own distance from itself in the coarser dtype: what rounding alone does to it is no
    fault of the result. Of a head over whole texts, tokens are texts.
    """
    dtype = next(result.parameters()).dtype
    coarser = max(dtype, stored, key=lambda each: torch.finfo(each).eps)
    found, n_tokens, largest = _measured(parent, result, evidence, coarser)
    is_score = evidence.task.name == "score" and coarser != torch.float32
    tolerance = Tolerance(max_difference=_SCORE_SHARE * largest) if is_score else TOLERANCES[coarser]
    n_continued = sum(len(row.ids) - row.n_given for row in evidence.continued)
    return Parity(
        dtype=str(dtype).removeprefix("torch."),
        n_tokens=n_tokens,
        n_continued=n_continued,
        max_difference=found.max_difference,
        kl=found.kl,
        top1=found.top1,
        greedy=found.greedy,
        perplexity=found.perplexity,
        parent_perplexity=evidence.perplexity,
        rounding=rounding,
        tolerance=tolerance,
        allowed=_allowed(tolerance, rounding, evidence.perplexity, (n_tokens, n_continued)),
    )


def distance(parent: Any, other: Any, evidence: Evidence, dtype: torch.dtype) -> Distance:
    """How far `other` is from the parent, whose evidence it is.

    Tokens whose logits are nearer to each other than the step of `dtype` at their size are tied: each of them is the most probable
    one.
    """
    return _measured(parent, other, evidence, dtype)[0]


def _allowed(limit: Tolerance, own: Distance | None, perplexity: float | None, n: tuple[int, int]) -> Tolerance:
    """The tolerance with the parent's own rounding on top; `n`: tokens of the rows, and of the continuations.

    Of few tokens, a share that is let go is a token at least.
    """
    greedy = limit.greedy
    if greedy is not None and n[1]:
        greedy = 1 - math.ceil((1 - greedy) * n[1] - 1e-9) / n[1]
    if own is None:
        return replace(limit, greedy=greedy)

    def more(value: float | None, by: float | None) -> float | None:
        return None if value is None else value + (by or 0.0)

    return Tolerance(
        max_difference=more(limit.max_difference, own.max_difference),
        kl=more(limit.kl, own.kl),
        top1=more(limit.top1, _lost(own.top1, n[0])),
        greedy=more(greedy, _lost(own.greedy, n[1])),
        perplexity=more(limit.perplexity, _change(own.perplexity, perplexity)),
    )


def _lost(share: float | None, n: int) -> float | None:
    """What rounding takes off a share of `n` tokens (≤ 0), and what chance may in another rounding that is no worse: three
    standard errors of the difference between two such shares."""
    return None if share is None else share - 1 - 3 * math.sqrt(2 * share * (1 - share) / n)


def _change(perplexity: float | None, parent: float | None) -> float | None:
    return None if perplexity is None or parent is None else abs(perplexity / parent - 1)


@torch.no_grad()
def _measured(parent: Any, other: Any, evidence: Evidence, dtype: torch.dtype) -> tuple[Distance, int, float]:
    """The distance, the tokens that it is over, and the largest logit of the parent."""
    logits_of = LOGITS[evidence.task.name]
    eps = torch.finfo(dtype).eps
    apart: list[torch.Tensor] = []
    nll, largest = 0.0, 0.0
    n_tokens = n_targets = n_same = n_continued = 0
    for row in evidence.rows:
        (expected, targets), (found, _) = logits_of(parent, row), logits_of(other, row)
        apart.append(_apart(expected, found, eps))
        known = targets != NO_TARGET
        nll += nll_of(found, targets, known)
        largest = max(largest, float(expected.abs().max()))
        n_tokens += len(targets)
        n_targets += int(known.sum())
    slack = 2 * (TOLERANCES[dtype].max_difference or 0.0)
    for row in evidence.continued:
        said = slice(row.n_given - 1, -1)
        expected, found = (logits_of(model, row)[0][said] for model in (parent, other))
        n_same += int(_is_best(expected, found, eps, slack).sum())
        n_continued += len(expected)
    rows_R3 = torch.stack(apart)
    # What is no number is infinitely far.
    worst = float(rows_R3[:, 0].max().nan_to_num(nan=float("inf"), posinf=float("inf")))
    kl, top1 = (rows_R3[:, 1:].sum(dim=0) / n_tokens).tolist()
    greedy = n_same / n_continued if n_continued else None
    return Distance(worst, kl, top1, greedy, perplexity_of(nll, n_targets)), n_tokens, largest


def _apart(expected: torch.Tensor, found: torch.Tensor, eps: float) -> torch.Tensor:
    """Of a row: largest difference of a logit, Σ KL, and positions whose most probable token is the same; float64 [3]."""
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    is_best = _is_best(expected, found, eps)
    parts = ((expected - found).abs().max(), (log_p.exp() * (log_p - log_q)).sum(), is_best.sum())
    return torch.stack([each.double() for each in parts])


def _is_best(expected: torch.Tensor, found: torch.Tensor, eps: float, slack: float = 0.0) -> torch.Tensor:
    """Whether the token that is found most probable is so, or tied with that, as expected; bool [N, 1]."""
    best = expected.amax(-1, keepdim=True)
    return expected.gather(-1, found.argmax(-1, keepdim=True)) >= best - (eps * best.abs()).clamp(min=slack)


def require_parity(what: str, measured: Sequence[Parity]) -> None:
    """Raise `ParityError` when one is past its tolerance."""
    for parity in measured:
        problems = parity.problems()
        if problems:
            raise ParityError(
                f"{what} does not compute what its parent does, in {parity.dtype}: {'; '.join(problems)}."
            )
