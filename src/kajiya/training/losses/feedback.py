"""KTO: answers that were called good or bad, one by one. Shape letters: E examples, each one sequence."""

from typing import Any

import torch

from kajiya.config.options import KTOLoss
from kajiya.data.batch import ExampleBatch
from kajiya.errors import TrainingError
from kajiya.evals.scoring import evaluation_mode
from kajiya.training.losses import Terms
from kajiya.training.losses.sequences import reference_log_probs, sequence_log_probs


def kto(model: Any, batch: ExampleBatch, options: KTOLoss) -> tuple[Terms, Terms]:
    """Kahneman–Tversky optimization (Ethayarajh et al., arXiv:2402.01306, equation 8); term `loss`, over the examples.

    Good: weight · (1 − σ(beta · (ratio − z))), bad: weight · (1 − σ(beta · (z − ratio))), where z, the reference point, is the
    divergence that `kto_reference_point` measured over the whole group (`batch.measured["kl"]`).
    """
    labels_E = _labels(batch)
    if batch.measured is None:
        raise TrainingError("KTO's reference point was not measured over the group of micro-batches before them")
    point = torch.as_tensor(batch.measured["kl"], device=labels_E.device).clamp(min=0)
    reference_E = reference_log_probs(model, batch, options.chunk_tokens)
    log_probs_E, _ = sequence_log_probs(model, batch, options.chunk_tokens)
    ratios_E = log_probs_E - reference_E
    is_good_E = labels_E > 0.5
    gain_E = torch.where(is_good_E, ratios_E - point, point - ratios_E)
    weights_E = torch.where(is_good_E, options.desirable_weight, options.undesirable_weight)
    total = (weights_E * (1 - torch.sigmoid(options.beta * gain_E))).sum()
    rewards_E = options.beta * ratios_E.detach()
    n_good, n_bad = is_good_E.sum(), (~is_good_E).sum()
    is_right_E = torch.where(is_good_E, rewards_E > options.beta * point, rewards_E < options.beta * point)
    metrics: Terms = {
        "loss": (total.detach(), "examples"),
        "kl": (point * len(labels_E), "examples"),
        "rewards/chosen": (_sum_where(is_good_E, rewards_E), n_good),
        "rewards/rejected": (_sum_where(~is_good_E, rewards_E), n_bad),
        "rewards/accuracies": (is_right_E.float().sum(), "examples"),
        "logps/chosen": (_sum_where(is_good_E, log_probs_E.detach()), n_good),
        "logps/rejected": (_sum_where(~is_good_E, log_probs_E.detach()), n_bad),
    }
    return {"loss": (total, "examples")}, metrics


def kto_reference_point(model: Any, batch: ExampleBatch, options: KTOLoss) -> Terms:
    """`kl`: Σ of log p − log p_reference of each prompt with the answer to another (equation 8's z₀ before it is cut at 0)."""
    if batch.mismatched is None:
        raise TrainingError("KTO needs each prompt with the answer to another, and the batch brings none")
    with torch.no_grad(), evaluation_mode(model):
        log_probs_E, _ = sequence_log_probs(model, batch.mismatched, options.chunk_tokens)
        reference_E = reference_log_probs(model, batch.mismatched, options.chunk_tokens)
    return {"kl": ((log_probs_E - reference_E).sum(), "examples")}


def _sum_where(wanted_E: torch.Tensor, values_E: torch.Tensor) -> torch.Tensor:
    return torch.where(wanted_E, values_E, 0).sum()


def _labels(batch: ExampleBatch) -> torch.Tensor:
    if batch.labels is None:
        raise TrainingError("KTO needs examples that are labelled good or bad")
    return batch.labels
