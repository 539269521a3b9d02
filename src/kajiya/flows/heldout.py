"""The loss and its metrics on held-out batches, of any kind: during training, and as the evaluation of a finished model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kajiya.config.tables import loss_row
from kajiya.evals.scoring import evaluation_mode, heldout_loss
from kajiya.evals.statistics import interval, ratio_scores
from kajiya.run.deferred import uncompiled
from kajiya.training.fit import Setup
from kajiya.training.losses import Loss, Measure
from kajiya.training.precision import Precision
from kajiya.training.terms import numbered


@dataclass(frozen=True)
class Scorer:
    """What scores a model: its loss, on a device, in a precision."""

    loss: Loss
    measure: Measure | None
    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class Sums:
    """A metric over held-out batches, or rows; those of all metrics lie in one order."""

    totals: np.ndarray
    """Sum of each batch, float64 [batches]."""
    counts: np.ndarray
    """What it is a sum over, float64 [batches]; 0 where the batch says nothing of the metric."""
    points: float | None = None
    """As `Scores`'s."""

    @property
    def mean(self) -> float:
        """Σ totals / Σ counts."""
        return float(self.totals.sum() / self.counts.sum())

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean, whole batches resampled; `None` where they cannot vary."""
        return interval(ratio_scores(self.totals, self.counts, points=self.points))


def score_batches(model: Any, batches: Sequence[Any], scorer: Scorer) -> dict[str, Sums]:
    """Each metric of the loss over the batches, the loss itself among them; the model is in evaluation mode for it.

    What the loss measures over a whole group, it measures over all of the batches.
    """
    rows: dict[str, np.ndarray] = {}
    # The eager blocks serve here: compiling them again without gradients would cost more than it saves.
    with evaluation_mode(model), torch.no_grad(), uncompiled():
        for number, batch in enumerate(_measured(model, batches, scorer)):
            given = batch.to(scorer.device)
            with scorer.precision.context(scorer.device):
                terms, metrics = scorer.loss(model, given)
            for name, (total, count) in numbered(terms | metrics, given.counts).items():
                # A batch without a single good (or bad) answer says nothing of their rewards.
                if count:
                    rows.setdefault(name, np.zeros((2, len(batches))))[:, number] = float(total), float(count)
    return {name: Sums(totals, counts) for name, (totals, counts) in rows.items()}


def heldout_values(name: str, setup: Setup, batches: Sequence[Any]) -> dict[str, float]:
    """Figures of the model in training on held-out batches, the one that is to fall first.

    Of losses of the next token, `eval/nll`, nats per target whatever the loss adds to it; else all that the loss tells.
    """
    if loss_row(name).takes == "tokens":
        return {"eval/nll": heldout_loss(setup.model, list(batches), setup.strategy.device)}
    scorer = Scorer(setup.loss, setup.measure, setup.strategy.device, setup.precision)
    figures = score_batches(setup.model, batches, scorer)
    first = {"eval/loss": figures["loss"].mean}
    return first | {f"eval/{each}": sums.mean for each, sums in figures.items()}


def _measured(model: Any, batches: Sequence[Any], scorer: Scorer) -> Sequence[Any]:
    if scorer.measure is None:
        return batches
    sums: dict[str, list[float]] = {}
    for batch in batches:
        given = batch.to(scorer.device)
        with scorer.precision.context(scorer.device):
            terms = scorer.measure(model, given)
        for name, (total, count) in numbered(terms, given.counts).items():
            so_far = sums.setdefault(name, [0.0, 0.0])
            so_far[0] += float(total)
            so_far[1] += float(count)
    measured = {name: total / count for name, (total, count) in sums.items()}
    return [replace(batch, measured=measured) for batch in batches]
