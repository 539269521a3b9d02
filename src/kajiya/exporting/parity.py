"""Whether two models compute the same: KL, top-1, greedy continuation and perplexity on the same rows, held to set tolerances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import ParityError
from kajiya.models.hidden import all_logits

_PROMPT_SHARE = 0.5
_CONTINUED_TOKENS = 24
_CONTINUED_ROWS = 4


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from its parent; `None`: not held to."""

    max_difference: float | None = None
    """Largest difference of a logit."""
    kl: float | None = None
    """Mean KL divergence from the parent, nats per token."""
    top1: float | None = None
    """Least share of positions whose most probable token is the same."""


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(max_difference=1e-4),
    torch.bfloat16: Tolerance(kl=1e-3, top1=0.995),
    torch.float16: Tolerance(kl=1e-3, top1=0.995),
}


@dataclass(frozen=True)
class Parity:
    """What was measured of a result beside its parent, on the same rows."""

    dtype: str
    n_tokens: int
    max_difference: float
    kl: float
    top1: float
    greedy: float
    """Share of greedily continued tokens that are the same up to the first that is not."""
    perplexity: float
    parent_perplexity: float
    tolerance: Tolerance
    is_held: bool
    """Whether the tolerance decides, or is told only."""

    def problems(self) -> list[str]:
        """What is past the tolerance, in words."""
        limit = self.tolerance
        found = []
        if not self.max_difference < float("inf"):
            found.append("logits that are no numbers")
        if limit.max_difference is not None and self.max_difference > limit.max_difference:
            found.append(f"a logit differs by {self.max_difference:.2g} (allowed: {limit.max_difference:g})")
        if limit.kl is not None and self.kl > limit.kl:
            found.append(f"KL {self.kl:.2g} nats per token (allowed: {limit.kl:g})")
        if limit.top1 is not None and self.top1 < limit.top1:
            found.append(f"the most probable token is the same at {self.top1:.2%} (least: {limit.top1:.1%})")
        return found


@torch.no_grad()
def compare(parent: Any, result: Any, rows: Sequence[Sequence[int]], *, is_held: bool = True) -> Parity:
    """Both models, in one dtype, on the same `rows` of token ids. Logits of one row are held at a time."""
    sums = {"kl": 0.0, "top1": 0.0, "nll": 0.0, "parent_nll": 0.0}
    n_tokens = 0
    difference = 0.0
    for row in rows:
        batch = one_row(row)
        expected, found = (all_logits(model, batch)[0].float() for model in (parent, result))
        # A plain max would let a NaN pass as the smaller of the two.
        worst = float((expected - found).abs().max())
        difference = max(difference, worst) if worst == worst else float("inf")
        log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
        following = batch.targets[0, :-1, None]
        sums["kl"] += float((log_p.exp() * (log_p - log_q)).sum())
        sums["top1"] += float((expected.argmax(-1) == found.argmax(-1)).sum())
        sums["parent_nll"] -= float(log_p[:-1].gather(1, following).sum())
        sums["nll"] -= float(log_q[:-1].gather(1, following).sum())
        n_tokens += len(row)
    n_targets = n_tokens - len(rows)
    dtype = next(result.parameters()).dtype
    return Parity(
        dtype=str(dtype).removeprefix("torch."),
        n_tokens=n_tokens,
        max_difference=difference,
        kl=sums["kl"] / n_tokens,
        top1=sums["top1"] / n_tokens,
        greedy=_greedy_share(parent, result, rows[:_CONTINUED_ROWS]),
        perplexity=float(torch.tensor(sums["nll"] / n_targets).exp()),
        parent_perplexity=float(torch.tensor(sums["parent_nll"] / n_targets).exp()),
        tolerance=TOLERANCES[dtype],
        is_held=is_held,
    )


@torch.no_grad()
def perplexity(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """Of the model on rows of token ids, each a document alone."""
    nll = 0.0
    for row in rows:
        batch = one_row(row)
        log_p = all_logits(model, batch)[0, :-1].float().log_softmax(-1)
        nll -= float(log_p.gather(1, batch.targets[0, :-1, None]).sum())
    return float(torch.tensor(nll / sum(len(row) - 1 for row in rows)).exp())


def require_parity(what: str, measured: Sequence[Parity]) -> None:
    """Raise `ParityError` when one that is held to its tolerance is past it."""
    for parity in measured:
        problems = parity.problems() if parity.is_held else []
        if problems:
            raise ParityError(
                f"{what} does not compute what its parent does, in {parity.dtype}: {'; '.join(problems)}."
            )


def one_row(ids: Sequence[int]) -> Batch:
    """One document alone, each token's target the one behind it."""
    tokens = torch.tensor([list(ids)])
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, :-1] = tokens[:, 1:]
    places = torch.arange(tokens.shape[1])[None]
    return Batch(tokens, targets, places, torch.zeros_like(tokens), tokens.shape[1] - 1)


def _greedy_share(parent: Any, result: Any, rows: Sequence[Sequence[int]]) -> float:
    same = 0
    for row in rows:
        prompt = list(row[: max(1, round(len(row) * _PROMPT_SHARE))])
        for _ in range(_CONTINUED_TOKENS):
            # As long as the two agree they read the same, so one prompt serves both.
            first, second = (int(all_logits(model, one_row(prompt))[0, -1].argmax()) for model in (parent, result))
            if first != second:
                break
            same += 1
            prompt.append(first)
    return same / (_CONTINUED_TOKENS * len(rows))
