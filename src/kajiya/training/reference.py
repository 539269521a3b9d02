"""Log-probabilities under the model as it was before training, computed once for every example, kept, and looked up.

Shape letters: E examples of a batch, k sequences of each.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kajiya.data.batch import ExampleBatch
from kajiya.evals.scoring import evaluation_mode
from kajiya.run.deferred import uncompiled
from kajiya.training.losses.sequences import sequence_log_probs
from kajiya.training.precision import Precision

FILE = "reference.safetensors"
_MISMATCHED = ".mismatched"
Table = Mapping[str, torch.Tensor]
"""By split (and `<split>.mismatched`): log-probability of each sequence, nats, float32 [examples, k]; NaN where there is none."""


def compute_reference(
    model: nn.Module,
    batches: Iterable[ExampleBatch],
    split: str,
    device: torch.device,
    precision: Precision,
    chunk_tokens: int,
) -> dict[str, torch.Tensor]:
    """The table of one split, from batches that hold each of its examples."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    with evaluation_mode(model), torch.no_grad(), uncompiled():
        for batch in batches:
            for name, each in ((split, batch), (split + _MISMATCHED, batch.mismatched)):
                if each is None:
                    continue
                with precision.context(device):
                    sums, _ = sequence_log_probs(model, each.to(device), chunk_tokens)
                rows = sums.float().cpu().reshape(len(each.examples), -1)
                found.setdefault(name, {}).update(zip(each.examples.tolist(), rows, strict=True))
    return {name: _dense(rows) for name, rows in found.items()}


def save_reference(table: Table, folder: Path) -> None:
    """Write the table into `folder`."""
    from safetensors.torch import save_file

    save_file(dict(table), folder / FILE)


def open_reference(folder: Path) -> Table:
    """The table in `folder`."""
    from safetensors.torch import load_file

    return load_file(folder / FILE)


def add_reference(table: Table, split: str) -> Callable[[ExampleBatch], ExampleBatch]:
    """What adds to a batch of the split the reference of its sequences, and of its mismatched ones."""

    def add(batch: ExampleBatch) -> ExampleBatch:
        mismatched = batch.mismatched
        if mismatched is not None:
            mismatched = replace(mismatched, reference=table[split + _MISMATCHED][mismatched.examples].reshape(-1))
        reference = table[split][batch.examples].reshape(-1)
        assert not reference.isnan().any(), "an example without a reference"
        return replace(batch, reference=reference, mismatched=mismatched)

    return add


def _dense(rows: Mapping[int, torch.Tensor]) -> torch.Tensor:
    table = torch.full((max(rows) + 1, len(next(iter(rows.values())))), float("nan"))
    for number, row in rows.items():
        table[number] = row
    return table
