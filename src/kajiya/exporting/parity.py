"""Whether two models compute the same: KL, top-1, greedy continuation and perplexity on the same rows, held to set tolerances."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, Seq2SeqBatch
from kajiya.errors import ParityError
from kajiya.models.hidden import all_logits
from kajiya.models.outputs import decoder_start, masked_logits, seq2seq_logits
from kajiya.models.tasks import CAUSAL, Task

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
    """Least share of positions whose most probable token is the same, but for ties (see `compare`)."""


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(max_difference=1e-4),
    torch.bfloat16: Tolerance(kl=1e-3, top1=0.995),
    torch.float16: Tolerance(kl=1e-3, top1=0.995),
}
_SCORE_SHARE = 0.05
"""Of a head of one number in 16 bits, which has neither KL nor top-1: largest difference, over the largest number."""


@dataclass(frozen=True)
class Distance:
    """How far logits are from those that were expected."""

    max_difference: float
    kl: float
    top1: float


_NONE = Distance(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Parity:
    """What was measured of a result beside its parent, on the same rows."""

    dtype: str
    n_tokens: int
    max_difference: float
    kl: float
    top1: float
    rounding: Distance | None
    """How far the parent is from itself when it is rounded as the result is; the tolerance holds for what comes on top of it."""
    greedy: float | None
    """Share of greedily continued tokens that are the same up to the first that is not; of causal models alone."""
    perplexity: float | None
    """`None` where the head predicts no text that is known."""
    parent_perplexity: float | None
    tolerance: Tolerance

    def problems(self) -> list[str]:
        """What is past the tolerance, in words."""
        limit, own = self.tolerance, self.rounding or _NONE
        found = []
        if not self.max_difference < float("inf"):
            found.append("logits that are no numbers")
        if limit.max_difference is not None and self.max_difference - own.max_difference > limit.max_difference:
            found.append(f"a logit differs by {self.max_difference:.2g} (allowed: {limit.max_difference:g})")
        if limit.kl is not None and self.kl - own.kl > limit.kl:
            found.append(f"KL {self.kl:.2g} nats per token (allowed: {limit.kl + own.kl:.2g})")
        if limit.top1 is not None and self.top1 < limit.top1 - (1 - own.top1):
            least = limit.top1 - (1 - own.top1)
            found.append(f"the most probable token is the same at {self.top1:.2%} (least: {least:.2%})")
        return found


@torch.no_grad()
def compare(
    parent: Any,
    result: Any,
    rows: Sequence[Sequence[int]],
    *,
    task: Task = CAUSAL,
    stored: torch.dtype = torch.float32,
    rounded: Any = None,
) -> Parity:
    """Both models, with the task's head, on the same `rows` of token ids; logits of one row at a time.

    The tolerance is that of the dtype in which the result computes, or, where its weights were rounded to a coarser one (`stored`),
    of that. `rounded` is the parent in the coarser dtype: what rounding alone does to it is no fault of the result. Of a head over
    whole texts, tokens are texts. Tokens whose logits are nearer to each other than the coarser dtype's step at their size are
    tied: each of them is the most probable one.
    """
    dtype = next(result.parameters()).dtype
    coarser = max(dtype, stored, key=lambda each: torch.finfo(each).eps)
    models = [result] if rounded is None else [result, rounded]
    apart: list[list[torch.Tensor]] = []
    nll = torch.zeros(2, dtype=torch.float64)
    n_tokens = n_targets = 0
    largest = 0.0
    for row in rows:
        expected, targets = _LOGITS[task.name](parent, row)
        found = [_LOGITS[task.name](model, row)[0] for model in models]
        apart.append([_apart(expected, each, torch.finfo(coarser).eps) for each in found])
        known = targets != NO_TARGET
        for number, logits in enumerate((found[0], expected)):
            nll[number] -= logits.log_softmax(-1)[known].gather(1, targets[known, None]).sum()
        largest = max(largest, float(expected.abs().max()))
        n_tokens += len(targets)
        n_targets += int(known.sum())
    own, *others = (_distance(torch.stack(each), n_tokens) for each in zip(*apart, strict=True))
    perplexities = (nll / n_targets).exp().tolist() if n_targets else [None, None]
    is_score = task.name == "score" and coarser != torch.float32
    return Parity(
        dtype=str(dtype).removeprefix("torch."),
        n_tokens=n_tokens,
        max_difference=own.max_difference,
        kl=own.kl,
        top1=own.top1,
        rounding=others[0] if others else None,
        greedy=_greedy_share(parent, result, rows[:_CONTINUED_ROWS]) if task == CAUSAL else None,
        perplexity=perplexities[0],
        parent_perplexity=perplexities[1],
        tolerance=Tolerance(max_difference=_SCORE_SHARE * largest) if is_score else TOLERANCES[coarser],
    )


def _apart(expected: torch.Tensor, found: torch.Tensor, eps: float) -> torch.Tensor:
    """Of a row: largest difference of a logit, Σ KL, and positions whose most probable token is the same; float64 [3]."""
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    best = expected.amax(-1, keepdim=True)
    is_best = expected.gather(-1, found.argmax(-1, keepdim=True)) >= best - eps * best.abs()
    parts = ((expected - found).abs().max(), (log_p.exp() * (log_p - log_q)).sum(), is_best.sum())
    return torch.stack([each.double() for each in parts])


def _distance(rows_R3: torch.Tensor, n_tokens: int) -> Distance:
    """Of all rows; what is no number is infinitely far."""
    worst = rows_R3[:, 0].max().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return Distance(float(worst), *(rows_R3[:, 1:].sum(dim=0) / n_tokens).tolist())


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
    """Raise `ParityError` when one is past its tolerance."""
    for parity in measured:
        problems = parity.problems()
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


def _of_text(model: Any, row: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = one_row(row)
    return all_logits(model, batch)[0].float(), batch.targets[0]


def _of_masked(model: Any, row: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = replace(one_row(row), is_causal=False)
    return masked_logits(model, batch)[0].float(), torch.full_like(batch.targets[0], NO_TARGET)


def _of_pair(model: Any, row: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of the row is the input, the second the target."""
    inputs, targets = (torch.tensor([list(part)]) for part in (row[: len(row) // 2], row[len(row) // 2 :]))
    start = torch.tensor([[decoder_start(model)]])
    batch = Seq2SeqBatch(
        inputs, torch.ones_like(inputs).bool(), torch.cat([start, targets[:, :-1]], dim=1), targets, targets.shape[1]
    )
    return seq2seq_logits(model, batch)[0].float(), targets[0]


def _of_whole(model: Any, row: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([list(row)])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float(), torch.tensor([NO_TARGET])


_LOGITS: Mapping[str, Callable[[Any, Sequence[int]], tuple[torch.Tensor, torch.Tensor]]] = {
    "causal": _of_text,
    "masked": _of_masked,
    "seq2seq": _of_pair,
    "classes": _of_whole,
    "score": _of_whole,
}
"""By the task's name: logits [N, V] of a row of token ids, and the target of each, `NO_TARGET` where none is known."""


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
