"""Losses over pairs of a chosen and a rejected answer: DPO and its kin, ORPO, SimPO, and the reward model.

Metrics carry the names that TRL gives them. Shape letters: E examples, S = 2 · E sequences (chosen, rejected, chosen …).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from kajiya.config.options import DPOLoss, ORPOLoss, RewardLoss, SimPOLoss
from kajiya.data.batch import ExampleBatch
from kajiya.models.outputs import sequence_logits
from kajiya.training.losses import Terms
from kajiya.training.losses.sequences import reference_log_probs, sequence_log_probs


def _sigmoid(margin_E: torch.Tensor, options: DPOLoss) -> torch.Tensor:
    """DPO (Rafailov et al., arXiv:2305.18290, equation 7), conservative where smoothed (Mitchell, 2023, equation 3)."""
    smoothing = options.label_smoothing
    z_E = options.beta * margin_E
    return -(1 - smoothing) * logsigmoid(z_E) - smoothing * logsigmoid(-z_E)


def _robust(margin_E: torch.Tensor, options: DPOLoss) -> torch.Tensor:
    """Unbiased where a share of the labels is flipped (Chowdhury et al., rDPO, arXiv:2403.00409, equation 12)."""
    smoothing = options.label_smoothing
    z_E = options.beta * margin_E
    return (-(1 - smoothing) * logsigmoid(z_E) + smoothing * logsigmoid(-z_E)) / (1 - 2 * smoothing)


def _hinge(margin_E: torch.Tensor, options: DPOLoss) -> torch.Tensor:
    """The hinge of SLiC-HF (Zhao et al., arXiv:2305.10425), on DPO's margin (Liu et al., arXiv:2309.06657)."""
    return torch.relu(1 - options.beta * margin_E)


def _ipo(margin_E: torch.Tensor, options: DPOLoss) -> torch.Tensor:
    """IPO (Azar et al., arXiv:2310.12036, equation 17; tau is beta), on log-ratios per token, as its authors ran it."""
    return (margin_E - 1 / (2 * options.beta)).square()


_DPO: Mapping[str, tuple[Callable[[torch.Tensor, DPOLoss], torch.Tensor], bool]] = {
    "sigmoid": (_sigmoid, False),
    "sigmoid_norm": (_sigmoid, True),
    "robust": (_robust, False),
    "hinge": (_hinge, False),
    "ipo": (_ipo, True),
}
"""By `kind`: the loss of a margin of log-ratios, and whether these are per token."""


def dpo(model: Any, batch: ExampleBatch, options: DPOLoss) -> tuple[Terms, Terms]:
    """Direct preference optimization; term `loss`, over the pairs."""
    # First, so that the reference's pass does not stand beside the activations of the model's own.
    reference_S = reference_log_probs(model, batch, options.chunk_tokens)
    log_probs_S, lengths_S = sequence_log_probs(model, batch, options.chunk_tokens)
    ratios_S = log_probs_S - reference_S
    function, per_token = _DPO[options.kind]
    chosen_E, rejected_E = _pairs(ratios_S / lengths_S.clamp(min=1) if per_token else ratios_S)
    terms: Terms = {"loss": (function(chosen_E - rejected_E, options).sum(), "examples")}
    return terms, terms_of_pairs(terms, options.beta * ratios_S) | _log_probs(log_probs_S)


def orpo(model: Any, batch: ExampleBatch, options: ORPOLoss) -> tuple[Terms, Terms]:
    """Odds-ratio preference optimization (Hong et al., arXiv:2403.07691, equations 6 and 7); no reference.

    −mean log p of the chosen answer's tokens + beta · −log σ(log odds of the chosen − log odds of the rejected), where the
    odds are of the mean token probability p = exp(mean log p). The metric `nll` is the first part.
    """
    log_probs_S, lengths_S = sequence_log_probs(model, batch, options.chunk_tokens)
    mean_S = log_probs_S / lengths_S.clamp(min=1)
    chosen_E, rejected_E = _pairs(mean_S - log1mexp(mean_S))
    nll_E = -_pairs(mean_S)[0]
    terms: Terms = {"loss": ((nll_E - options.beta * logsigmoid(chosen_E - rejected_E)).sum(), "examples")}
    metrics = terms_of_pairs(terms, options.beta * mean_S) | _log_probs(mean_S)
    return terms, metrics | {"nll": (nll_E.detach().sum(), "examples")}


def simpo(model: Any, batch: ExampleBatch, options: SimPOLoss) -> tuple[Terms, Terms]:
    """Simple preference optimization (Meng et al., arXiv:2405.14734, equation 6); no reference.

    −log σ(beta · (mean log p of the chosen − that of the rejected) − gamma).
    """
    log_probs_S, lengths_S = sequence_log_probs(model, batch, options.chunk_tokens)
    mean_S = log_probs_S / lengths_S.clamp(min=1)
    chosen_E, rejected_E = _pairs(mean_S)
    terms: Terms = {"loss": (-logsigmoid(options.beta * (chosen_E - rejected_E) - options.gamma).sum(), "examples")}
    return terms, terms_of_pairs(terms, options.beta * mean_S) | _log_probs(mean_S)


def reward(model: Any, batch: ExampleBatch, options: RewardLoss) -> tuple[Terms, Terms]:
    """Bradley–Terry reward model: −log σ(reward of the chosen − that of the rejected − margin).

    The margin is the pair's label, where it has one (Touvron et al., Llama 2, arXiv:2307.09288, equation 2). `centering` adds its
    weight times the square of the pair's summed rewards (Eisenstein et al., arXiv:2312.09244).
    """
    rewards_S = sequence_logits(model, batch).squeeze(-1).float()
    chosen_E, rejected_E = _pairs(rewards_S)
    margin_E = chosen_E - rejected_E if batch.labels is None else chosen_E - rejected_E - batch.labels
    losses_E = -logsigmoid(margin_E) + options.centering * (chosen_E + rejected_E).square()
    terms: Terms = {"loss": (losses_E.sum(), "examples")}
    return terms, terms_of_pairs(terms, rewards_S)


def terms_of_pairs(terms: Terms, rewards_S: torch.Tensor) -> Terms:
    """The loss's terms and the rewards of both sides, their margin, and how often the chosen one's is the larger."""
    chosen_E, rejected_E = _pairs(rewards_S.detach())
    figures = {
        "rewards/chosen": chosen_E,
        "rewards/rejected": rejected_E,
        "rewards/margins": chosen_E - rejected_E,
        "rewards/accuracies": (chosen_E > rejected_E).float(),
    }
    own: Terms = {name: (total.detach(), unit) for name, (total, unit) in terms.items()}
    return own | {name: (values.sum(), "examples") for name, values in figures.items()}


def _log_probs(values_S: torch.Tensor) -> Terms:
    chosen_E, rejected_E = _pairs(values_S.detach())
    return {"logps/chosen": (chosen_E.sum(), "examples"), "logps/rejected": (rejected_E.sum(), "examples")}


def _pairs(values_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the chosen and of the rejected sequences, [E] each."""
    return values_S[0::2], values_S[1::2]


def log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 − eˣ) for x < 0, without loss of digits near 0 (Mächler, 2012, equation 7); −0 is taken as just below it."""
    below = values.clamp(max=-torch.finfo(values.dtype).tiny)
    near = below > -math.log(2)
    # The branch that is not taken must stay finite too, or its gradient is not a number.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, below, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
    )
