"""Two micro-batches made into the one that a larger micro-batch would have been, and a part of one."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch, Seq2SeqBatch
from kajiya.preflight.parts import some_answers, some_examples, with_targets


def can_join(batch: Any) -> bool:
    """Whether batches of this kind are known here."""
    return isinstance(batch, (Batch, ExampleBatch, RolloutBatch, Seq2SeqBatch))


def joined(first: Any, second: Any) -> Any:
    """The rows of both in one batch, filled up to one length where theirs differ."""
    if isinstance(first, ExampleBatch):
        return _joined_examples(first, second)
    if isinstance(first, Seq2SeqBatch):
        return _joined_pairs(first, second)
    if isinstance(first, RolloutBatch):
        return _joined_answers(first, second)
    return _joined_rows(first, second)


def with_fewer(batch: Any) -> Any:
    """The first half of the examples, one more where they are odd; any other batch as it is."""
    if not isinstance(batch, ExampleBatch) or len(batch.examples) < 2:
        return batch
    return some_examples(batch, range((len(batch.examples) + 1) // 2))


def in_two(batch: RolloutBatch) -> tuple[RolloutBatch, RolloutBatch] | None:
    """All prompts but the last, and the last with a third of each answer; `None` where there is but one."""
    n, size = len(batch.advantages), batch.group_size
    if n == size:
        return None
    return some_answers(batch, range(n - size), size), with_a_third(some_answers(batch, range(n - size, n), size))


def with_a_third(batch: RolloutBatch) -> RolloutBatch:
    """The same with the first third of each answer, one token at least."""
    number = (batch.rows.targets != NO_TARGET).cumsum(dim=1)
    most = (number.amax(dim=1, keepdim=True) // 3).clamp(min=1)
    return with_targets(batch, batch.rows.targets.where(number <= most, NO_TARGET))


def _joined_rows(first: Batch, second: Batch) -> Batch:
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    parts = [_widened(each, width) for each in (first, second)]
    weights, sources = (
        torch.cat(found) if len(found) == 2 else None
        for found in (
            [each.weights for each in parts if each.weights is not None],
            [each.sources for each in parts if each.sources is not None],
        )
    )
    both = replace(
        first,
        tokens=torch.cat([each.tokens for each in parts]),
        targets=torch.cat([each.targets for each in parts]),
        positions=torch.cat([each.positions for each in parts]),
        segments=torch.cat([each.segments for each in parts]),
        n_targets=first.n_targets + second.n_targets,
        weights=weights,
        sources=sources,
    )
    return both.with_future(len(first.future))


def _widened(rows: Batch, width: int) -> Batch:
    """Rows of that many tokens, the further ones a segment of their own without targets."""
    more = width - rows.tokens.shape[1]
    if not more:
        return rows
    place = torch.arange(more).expand(len(rows.tokens), more)
    return replace(
        rows,
        tokens=pad(rows.tokens, (0, more)),
        targets=pad(rows.targets, (0, more), value=NO_TARGET),
        positions=torch.cat([rows.positions, place], dim=1),
        segments=torch.cat([rows.segments, (rows.segments[:, -1:] + 1).expand(-1, more)], dim=1),
        weights=None if rows.weights is None else pad(rows.weights, (0, more)),
        sources=None if rows.sources is None else pad(rows.sources, (0, more), value=-1),
    )


def _joined_examples(first: ExampleBatch, second: ExampleBatch) -> ExampleBatch:
    rows = _joined_rows(first.rows, second.rows)
    width = rows.tokens.shape[1]
    owners, lasts, n_sequences, n_rows = [], [], 0, 0
    for part in (first, second):
        own_width = part.owner.shape[1]
        owner = torch.where(part.owner >= 0, part.owner + n_sequences, -1)
        owners.append(pad(owner, (0, width - own_width), value=-1))
        lasts.append((part.last // own_width + n_rows) * width + part.last % own_width)
        n_sequences += len(part.last)
        n_rows += len(part.owner)
    mismatched = None
    if first.mismatched is not None and second.mismatched is not None:
        mismatched = _joined_examples(first.mismatched, second.mismatched)
    return replace(
        first,
        rows=rows,
        owner=torch.cat(owners),
        last=torch.cat(lasts),
        examples=torch.cat([first.examples, second.examples]),
        labels=_joined_vectors(first.labels, second.labels),
        reference=_joined_vectors(first.reference, second.reference),
        mismatched=mismatched,
    )


def _joined_answers(first: RolloutBatch, second: RolloutBatch) -> RolloutBatch:
    rows = _joined_rows(first.rows, second.rows)
    width = rows.tokens.shape[1]

    def both(name: str) -> torch.Tensor | None:
        parts = [vars(each)[name] for each in (first, second)]
        return None if parts[0] is None else torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])

    tables: dict[str, Any] = {name: both(name) for name in ("sampled", "old", "reference")}
    return replace(
        first,
        rows=rows,
        advantages=torch.cat([first.advantages, second.advantages]),
        rewards=torch.cat([first.rewards, second.rewards]),
        is_cut=torch.cat([first.is_cut, second.is_cut]),
        **tables,
    )


def _joined_vectors(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _joined_pairs(first: Seq2SeqBatch, second: Seq2SeqBatch) -> Seq2SeqBatch:
    def both(name: str, filling: float) -> torch.Tensor:
        parts = [vars(each)[name] for each in (first, second)]
        width = max(part.shape[1] for part in parts)
        return torch.cat([pad(part, (0, width - part.shape[1]), value=filling) for part in parts])

    return Seq2SeqBatch(
        inputs=both("inputs", 0),
        inputs_mask=both("inputs_mask", False),
        tokens=both("tokens", 0),
        targets=both("targets", NO_TARGET),
        n_targets=first.n_targets + second.n_targets,
        examples=_joined_vectors(first.examples, second.examples),
    )
