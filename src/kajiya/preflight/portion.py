"""Small portions of the real batches, so that proving costs seconds."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kajiya.data.batch import NO_TARGET, Batch, RolloutBatch
from kajiya.training.fit import Setup

_ROWS = 2
_TOKENS = 96


def first_batch(setup: Setup) -> Any:
    """A portion of the next batch; the loader is left where it was."""
    position = setup.loader.state()
    batch = setup.loader.next()
    setup.loader.load_state(position)
    return portion(batch)


def portion(batch: Any, rows: int = _ROWS, tokens: int = _TOKENS) -> Any:
    """The beginning of the rows of packed text that have the most targets there; batches of whole examples stay whole.

    Answers that all earned the same teach nothing: one and the next get advantages of 1 and −1.
    """
    if isinstance(batch, RolloutBatch) and not bool(batch.advantages.any()):
        signs = torch.ones_like(batch.advantages)
        signs[1::2] = -1
        return replace(batch, advantages=signs)
    if not isinstance(batch, Batch):
        return batch
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
