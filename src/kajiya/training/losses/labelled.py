"""Classification and regression of whole sequences. Shape letters: E examples, C classes."""

from typing import Any

import torch

from kajiya.config.options import ClassifyLoss, RegressLoss
from kajiya.data.batch import ExampleBatch
from kajiya.errors import TrainingError
from kajiya.models.outputs import sequence_logits
from kajiya.training.losses import Terms


def classify(model: Any, batch: ExampleBatch, options: ClassifyLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of the class, nats; term `loss`, metrics `nll` (without smoothing) and `accuracy`, over the examples."""
    logits_EC, labels_E = sequence_logits(model, batch).float(), _labels(batch).long()
    total = torch.nn.functional.cross_entropy(
        logits_EC, labels_E, reduction="sum", label_smoothing=options.label_smoothing
    )
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(logits_EC, labels_E, reduction="sum")
        n_right = (logits_EC.argmax(dim=1) == labels_E).float().sum()
    return {"loss": (total, "examples")}, {"nll": (nll, "examples"), "accuracy": (n_right, "examples")}


def regress(model: Any, batch: ExampleBatch, options: RegressLoss) -> tuple[Terms, Terms]:
    """Squared error, or Huber's loss past `huber_delta`; metrics `squared_error` and `absolute_error`, over the examples."""
    values_E, labels_E = sequence_logits(model, batch).squeeze(-1).float(), _labels(batch).float()
    error_E = values_E - labels_E
    squared_E = error_E.square()
    losses_E = squared_E
    if options.huber_delta is not None:
        delta = options.huber_delta
        losses_E = torch.where(error_E.abs() <= delta, squared_E, delta * (2 * error_E.abs() - delta))
    metrics: Terms = {
        "loss": (losses_E.detach().sum(), "examples"),
        "squared_error": (squared_E.detach().sum(), "examples"),
        "absolute_error": (error_E.detach().abs().sum(), "examples"),
    }
    return {"loss": (losses_E.sum(), "examples")}, metrics


def _labels(batch: ExampleBatch) -> torch.Tensor:
    if batch.labels is None:
        raise TrainingError("the examples have no labels")
    return batch.labels
