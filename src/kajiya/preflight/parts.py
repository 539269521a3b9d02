"""Parts of batches: some of the examples of one, some of the answers of one.

Shape letters: B rows, T tokens of a row, E examples, S sequences (k of each example: S = E · k).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch


def some_examples(batch: ExampleBatch, chosen: Sequence[int]) -> ExampleBatch:
    """These examples, whole, each sequence in a row of its own; the rows are as long as the longest."""
    rows, k = batch.rows, len(batch.last) // len(batch.examples)
    index_E = torch.tensor(list(chosen))
    index_S = (index_E[:, None] * k + torch.arange(k)).flatten()
    # Where the tokens of each sequence lie in the flattened rows.
    places = [(batch.owner.flatten() == sequence).nonzero().squeeze(1) for sequence in index_S.tolist()]
    lengths_S = torch.tensor([len(each) for each in places])
    place_1T = torch.arange(int(lengths_S.max()))[None]
    is_token_ST = place_1T < lengths_S[:, None]
    source_ST = torch.zeros_like(is_token_ST, dtype=torch.int64)
    source_ST[is_token_ST] = torch.cat(places)

    def taken(tensor: torch.Tensor, filling: Any) -> torch.Tensor:
        return tensor.flatten()[source_ST].where(is_token_ST, filling)

    targets = taken(rows.targets, NO_TARGET)
    kept = replace(
        rows,
        tokens=taken(rows.tokens, 0),
        targets=targets,
        positions=taken(rows.positions, place_1T - lengths_S[:, None]),
        segments=(~is_token_ST).long(),
        n_targets=int((targets != NO_TARGET).sum()),
        weights=None if rows.weights is None else taken(rows.weights, 0.0),
        sources=None if rows.sources is None else taken(rows.sources, -1),
    )
    numbers_S = torch.arange(len(index_S))
    return replace(
        batch,
        rows=kept,
        owner=numbers_S[:, None].where(is_token_ST, -1),
        last=numbers_S * place_1T.shape[1] + lengths_S - 1,
        examples=batch.examples[index_E],
        labels=None if batch.labels is None else batch.labels[index_E],
        reference=None if batch.reference is None else batch.reference[index_S],
        mismatched=None if batch.mismatched is None else some_examples(batch.mismatched, chosen),
    )


def some_answers(batch: RolloutBatch, chosen: Sequence[int], group_size: int) -> RolloutBatch:
    """These answers, `group_size` to each prompt; what no row of them reaches is cut off."""
    index = torch.tensor(list(chosen))
    targets = batch.rows.targets[index]
    # The first segment of a row is prompt and answer.
    width = int((batch.rows.segments[index] == 0).sum(dim=1).max())

    def cut(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor[index][:, :width]

    rows = batch.rows
    kept = replace(
        rows,
        tokens=cut(rows.tokens),
        targets=targets[:, :width],
        positions=cut(rows.positions),
        segments=cut(rows.segments),
        n_targets=int((targets != NO_TARGET).sum()),
    )
    return replace(
        batch,
        rows=kept,
        sampled=cut(batch.sampled),
        old=cut(batch.old),
        reference=cut(batch.reference),
        advantages=batch.advantages[index],
        rewards=batch.rewards[index],
        is_cut=batch.is_cut[index],
        group_size=group_size,
    )


def with_targets(batch: RolloutBatch, targets: torch.Tensor) -> RolloutBatch:
    """The same with fewer targets; the rows end where their last one is."""
    is_target = targets != NO_TARGET
    width = int(is_target.any(dim=0).nonzero().max()) + 1
    rows: Batch = batch.rows
    names = ("tokens", "positions", "segments")
    shorter: dict[str, Any] = {name: vars(rows)[name][:, :width] for name in names}
    tables: dict[str, Any] = {
        name: None if table is None else (table * is_target)[:, :width]
        for name, table in (("sampled", batch.sampled), ("old", batch.old), ("reference", batch.reference))
    }
    kept = replace(rows, targets=targets[:, :width], n_targets=int(is_target.sum()), **shorter)
    return replace(batch, rows=kept, **tables)
