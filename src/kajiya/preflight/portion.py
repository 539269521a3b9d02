"""Small portions of the real batches, so that proving costs seconds."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch
from kajiya.preflight.parts import some_answers, some_examples, with_targets
from kajiya.training.fit import Setup

_ROWS = 2
_TOKENS = 96
_EXAMPLES = 4
_EXAMPLE_TOKENS = 192
"""Examples are taken until there are at least so many, with at least so many tokens together."""
_PROMPTS = 3
"""Two are one micro-batch and one is another, where a check needs uneven ones."""
_ANSWERS = 4
_ANSWER_TOKENS = 64


def first_batch(setup: Setup) -> Any:
    """A portion of the next batch; the loader is left where it was."""
    position = setup.loader.state()
    batch = setup.loader.next()
    setup.loader.load_state(position)
    return portion(batch)


def portion(batch: Any) -> Any:
    """A small part of a batch: the beginning of the rows of packed text that have the most targets there, the shortest examples,
    a few answers to a few prompts. Pairs of an encoder–decoder stay whole."""
    if isinstance(batch, RolloutBatch):
        return _few_answers(batch)
    if isinstance(batch, ExampleBatch):
        return _shortest(batch)
    return dense_windows(batch) if isinstance(batch, Batch) else batch


def _shortest(batch: ExampleBatch) -> ExampleBatch:
    """Whole examples: a pair may differ at its end alone, and a reference is of whole sequences."""
    n_all = len(batch.examples)
    k = len(batch.last) // n_all
    lengths = torch.bincount(batch.owner[batch.owner >= 0], minlength=len(batch.last)).view(n_all, k).sum(dim=1)
    chosen: list[int] = []
    for example in lengths.argsort(stable=True).tolist():
        if len(chosen) >= _EXAMPLES and int(lengths[chosen].sum()) >= _EXAMPLE_TOKENS:
            break
        chosen.append(example)
    return some_examples(batch, sorted(chosen))


def _few_answers(batch: RolloutBatch) -> RolloutBatch:
    """To the shortest prompts whose answers did not all earn the same, the answers that earned the most and the least; the
    answers' beginnings alone. Answers that all earned the same teach nothing: one and the next get advantages of 1 and −1."""
    size = batch.group_size
    advantages_GK = batch.advantages.view(-1, size)
    is_target_BT = batch.rows.targets != NO_TARGET
    begins_B = is_target_BT.int().argmax(dim=1)
    spread_G = advantages_GK.amax(dim=1) - advantages_GK.amin(dim=1)
    order = sorted(range(len(spread_G)), key=lambda group: (not spread_G[group] > 0, int(begins_B[group * size])))
    n = min(size, _ANSWERS)
    chosen = []
    for group in order[:_PROMPTS]:
        ranked = advantages_GK[group].argsort(descending=True, stable=True).tolist()
        chosen += [group * size + answer for answer in (*ranked[: n - n // 2], *ranked[size - n // 2 :])]
    part = some_answers(batch, chosen, n)
    width = int(begins_B[chosen].max()) + _ANSWER_TOKENS
    part = with_targets(part, part.rows.targets.where(torch.arange(part.rows.tokens.shape[1]) < width, NO_TARGET))
    if bool(part.advantages.any()):
        return part
    signs = torch.ones_like(part.advantages)
    signs[1::2] = -1
    return replace(part, advantages=signs)


def dense_windows(batch: Batch, rows: int = _ROWS, tokens: int = _TOKENS) -> Batch:
    """Of the rows that have the most targets in so many tokens, those tokens."""
    length = min(tokens, batch.tokens.shape[1])
    wanted = (batch.targets != NO_TARGET).int()
    # Where the targets begin late in a row (a long prompt), the portion begins late too.
    starts = [_densest(row, length) for row in wanted]
    order = sorted(range(len(starts)), key=lambda row: -int(wanted[row, starts[row] : starts[row] + length].sum()))
    chosen = order[: min(rows, len(order))]
    return windows(batch, chosen, [starts[row] for row in chosen], length)


def _densest(wanted_T: torch.Tensor, length: int) -> int:
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), wanted_T.long().cumsum(0)])
    return int((sums[length:] - sums[:-length]).argmax())


def windows(batch: Batch, rows: list[int], starts: list[int], length: int) -> Batch:
    """Of each of these rows the `length` tokens from its start on."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor[row, start : start + length] for row, start in zip(rows, starts, strict=True)])

    segments, positions, targets = cut(batch.segments), cut(batch.positions), cut(batch.targets)
    # What goes on from before the portion begins anew in it.
    first = segments == segments[:, :1]
    positions = torch.where(first, positions - positions[:, :1], positions)
    part = replace(
        batch,
        tokens=cut(batch.tokens),
        targets=targets,
        positions=positions,
        segments=segments - segments[:, :1],
        n_targets=int((targets != NO_TARGET).sum()),
        weights=None if batch.weights is None else cut(batch.weights),
        sources=None if batch.sources is None else cut(batch.sources),
    )
    return part.with_future(len(batch.future))


class Kept:
    """A loader that asks another for each batch once, and keeps it: answers that are drawn are drawn once for all checks."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.batches: list[Any] = []
        self.index = 0

    def next(self) -> Any:
        """The next of them."""
        if self.index == len(self.batches):
            self.batches.append(self.inner.next())
        self.index += 1
        return self.batches[self.index - 1]

    def state(self) -> dict[str, Any]:
        """How many were given out, and where the other loader is."""
        return {"index": self.index, "inner": self.inner.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Give out those after the first `index` again; the other loader stays where it is."""
        self.index = state["index"]


class Repeated:
    """A loader that gives the same batches again and again."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.index = 0

    def next(self) -> Any:
        """The next of them."""
        self.index += 1
        return self.batches[(self.index - 1) % len(self.batches)]

    def state(self) -> dict[str, int]:
        """How many were given out."""
        return {"index": self.index}

    def load_state(self, state: dict[str, int]) -> None:
        """Go there."""
        self.index = state["index"]


def without_dropout(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Turn every dropout off, in training mode too; returns what `restore_dropout` takes."""
    changed = []
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "hidden_dropout"):
            value = vars(module).get(name)
            if isinstance(value, float) and value > 0:
                changed.append((module, name, value))
                setattr(module, name, 0.0)
    return changed


def restore_dropout(changed: list[tuple[Any, str, float]]) -> None:
    """Turn it on again as it was."""
    for module, name, value in changed:
        setattr(module, name, value)
