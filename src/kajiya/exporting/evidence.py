"""What models are compared on: held-out rows, the parent's continuations of them, and its logits by the kind of its head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, Seq2SeqBatch
from kajiya.models.hidden import all_logits
from kajiya.models.outputs import decoder_start, masked_logits, named_ends, seq2seq_logits
from kajiya.models.tasks import CAUSAL, Task

_CONTINUED_TOKENS = 24


@dataclass(frozen=True)
class Row:
    """One held-out sequence."""

    ids: tuple[int, ...]
    n_given: int
    """Tokens that are given (a prompt, the input of a pair); what is behind them answers it."""

    def cut(self, n: int | None) -> "Row":
        """The first `n` tokens (`None`: all), of which one at least is no given one."""
        ids = self.ids[:n]
        return Row(ids, max(1, min(self.n_given, len(ids) - 1)))


def halved(ids: Sequence[int]) -> Row:
    """A text, whose first half is given."""
    return Row(tuple(ids), max(1, round(len(ids) / 2)))


@dataclass(frozen=True)
class Evidence:
    """What models are compared on, and what the parent says of it alone."""

    task: Task
    rows: tuple[Row, ...]
    continued: tuple[Row, ...]
    """Of a causal parent: the given tokens of each row, and what it goes on with, greedily, up to its end or 24 tokens."""
    perplexity: float | None
    """The parent's, of the rows; `None` where the head predicts no text that is known."""


@torch.no_grad()
def gather(parent: Any, rows: Sequence[Row], task: Task = CAUSAL, longest: int | None = None) -> Evidence:
    """What a parent, with the task's head, is to be compared on; of a row no more than `longest` tokens (`None`: all)."""
    cut = tuple(row.cut(longest) for row in rows)
    continued = tuple(_continued(parent, row, longest) for row in cut) if task == CAUSAL else ()
    return Evidence(task, cut, continued, perplexity(parent, cut, task))


def nll_of(logits: torch.Tensor, targets: torch.Tensor, known: torch.Tensor) -> float:
    return -float(logits.log_softmax(-1)[known].gather(1, targets[known, None]).double().sum())


def perplexity_of(nll: float, n_targets: int) -> float | None:
    return float(torch.tensor(nll / n_targets, dtype=torch.float64).exp()) if n_targets else None


def _continued(parent: Any, row: Row, longest: int | None) -> Row:
    """The row's given tokens, and what the parent goes on with."""
    ids, ends = list(row.ids[: row.n_given]), named_ends(parent) or set()
    n_all = min(row.n_given + _CONTINUED_TOKENS, longest or row.n_given + _CONTINUED_TOKENS)
    while len(ids) < n_all and (len(ids) == row.n_given or ids[-1] not in ends):
        ids.append(int(all_logits(parent, one_row(ids))[0, -1].argmax()))
    return Row(tuple(ids), row.n_given)


@torch.no_grad()
def perplexity(model: Any, rows: Sequence[Row], task: Task = CAUSAL) -> float | None:
    """Of the model, with the task's head, on rows that each stand alone; `None` where the head predicts no text that is known."""
    nll, n_targets = 0.0, 0
    for row in rows:
        logits, targets = LOGITS[task.name](model, row)
        known = targets != NO_TARGET
        nll += nll_of(logits, targets, known)
        n_targets += int(known.sum())
    return perplexity_of(nll, n_targets)


def one_row(ids: Sequence[int]) -> Batch:
    """One document alone, each token's target the one behind it."""
    tokens = torch.tensor([list(ids)])
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, :-1] = tokens[:, 1:]
    places = torch.arange(tokens.shape[1])[None]
    return Batch(tokens, targets, places, torch.zeros_like(tokens), tokens.shape[1] - 1)


def _of_text(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    batch = one_row(row.ids)
    return all_logits(model, batch)[0].float(), batch.targets[0]


def _of_masked(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    batch = replace(one_row(row.ids), is_causal=False)
    return masked_logits(model, batch)[0].float(), torch.full_like(batch.targets[0], NO_TARGET)


def _of_pair(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """What is given is the input, what is behind it the target."""
    inputs, targets = (torch.tensor([list(part)]) for part in (row.ids[: row.n_given], row.ids[row.n_given :]))
    start = torch.tensor([[decoder_start(model)]])
    batch = Seq2SeqBatch(
        inputs, torch.ones_like(inputs).bool(), torch.cat([start, targets[:, :-1]], dim=1), targets, targets.shape[1]
    )
    return seq2seq_logits(model, batch)[0].float(), targets[0]


def _of_whole(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([list(row.ids)])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float(), torch.tensor([NO_TARGET])


LOGITS: Mapping[str, Callable[[Any, Row], tuple[torch.Tensor, torch.Tensor]]] = {
    "causal": _of_text,
    "masked": _of_masked,
    "seq2seq": _of_pair,
    "classes": _of_whole,
    "score": _of_whole,
}
"""By the task's name: logits [N, V] of a row, and the target of each, `NO_TARGET` where none is known."""
