"""Policy optimization: answers of the model's own, followed by what they earned beside the others to their prompt.

Shape letters: B rows, each one answer behind its prompt, T tokens of a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kajiya.config.options import GRPOLoss
from kajiya.data.batch import NO_TARGET, RolloutBatch
from kajiya.errors import TrainingError
from kajiya.training.losses import Terms
from kajiya.training.losses.sequences import token_log_probs


def grpo(model: Any, batch: RolloutBatch, options: GRPOLoss) -> tuple[Terms, Terms]:
    """Group relative policy optimization (Shao et al., DeepSeekMath, arXiv:2402.03300, equation 3); term `loss`.

    −min(r · A, clip(r, 1 − clip_low, 1 + clip_high) · A) + beta · k3 of each token of an answer, where r is its probability
    over that before the first step on these answers, A the answer's advantage and k3 the estimate of the divergence from the
    reference (equation 4). Which tokens weigh how much is `options.normalize`.
    """
    log_probs_BT = token_log_probs(model, batch.rows, options.chunk_tokens)
    is_target_BT = batch.rows.targets != NO_TARGET
    # Before the first step on them, the present model is the one that gave the answers.
    old_BT = log_probs_BT.detach() if batch.old is None else batch.old
    advantages_B1 = batch.advantages[:, None]
    ratio_BT = torch.exp(log_probs_BT - old_BT)
    clipped_BT = ratio_BT.clamp(1 - options.clip_low, 1 + options.clip_high)
    losses_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    kl_BT = None
    if options.beta:
        kl_BT = divergence(log_probs_BT, _reference(batch))
        losses_BT = losses_BT + options.beta * kl_BT
    losses_BT = losses_BT * is_target_BT
    weigh, unit = NORMALIZED[options.normalize]
    total = weigh(losses_BT, is_target_BT, options).sum()
    with torch.no_grad():
        is_clipped_BT = is_target_BT & (ratio_BT * advantages_B1 > clipped_BT * advantages_B1)
        metrics: Terms = {"loss": (total.detach(), unit), "clipped": (is_clipped_BT.float().sum(), "targets")}
        if kl_BT is not None:
            metrics["kl"] = ((kl_BT * is_target_BT).sum(), "targets")
        metrics["entropy"] = (-(log_probs_BT * is_target_BT).sum(), "targets")
        metrics |= mismatch(old_BT, batch.sampled, is_target_BT) | reward_terms(batch)
    return {"loss": (total, unit)}, metrics


def divergence(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """k3 of each token, an unbiased estimate of KL(model ‖ reference) that is never negative (Schulman, 2020)."""
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def mismatch(own_BT: torch.Tensor, sampled_BT: torch.Tensor, is_target_BT: torch.Tensor) -> Terms:
    """How far the engine's log-probabilities of what it drew are from the trainer's: mean ratio, mean absolute difference."""
    difference_BT = own_BT - sampled_BT
    return {
        "mismatch/ratio": ((difference_BT.exp() * is_target_BT).sum(), "targets"),
        "mismatch/difference": ((difference_BT.abs() * is_target_BT).sum(), "targets"),
    }


def reward_terms(batch: RolloutBatch) -> Terms:
    """What the answers earned, their spread within a group, and how long they are."""
    rewards_GK = batch.rewards[:, 0].reshape(-1, batch.group_size)
    spread_G = rewards_GK.std(dim=1)
    parts: Terms = {
        f"rewards/{name}": (batch.rewards[:, number].sum(), "sequences") for number, name in enumerate(batch.names, 1)
    }
    return {
        "reward": (rewards_GK.sum(), "sequences"),
        "reward_std": (spread_G.sum(), "examples"),
        **parts,
        "alike": ((rewards_GK == rewards_GK[:, :1]).all(dim=1).float().sum(), "examples"),
        "length": ((batch.rows.targets != NO_TARGET).float().sum(), "sequences"),
        "cut": (batch.is_cut.float().sum(), "sequences"),
    }


def _by_token(losses_BT: torch.Tensor, is_target_BT: torch.Tensor, options: GRPOLoss) -> torch.Tensor:
    return losses_BT


def _by_sequence(losses_BT: torch.Tensor, is_target_BT: torch.Tensor, options: GRPOLoss) -> torch.Tensor:
    return losses_BT / is_target_BT.sum(dim=1, keepdim=True).clamp(min=1)


def _by_constant(losses_BT: torch.Tensor, is_target_BT: torch.Tensor, options: GRPOLoss) -> torch.Tensor:
    return losses_BT / options.max_tokens


NORMALIZED: Mapping[str, tuple[Callable[[torch.Tensor, torch.Tensor, GRPOLoss], torch.Tensor], str]] = {
    "token": (_by_token, "targets"),
    "sequence": (_by_sequence, "sequences"),
    "constant": (_by_constant, "sequences"),
}
"""By `normalize`: the weighed losses of the tokens, and what their sum is a sum over."""


def _reference(batch: RolloutBatch) -> torch.Tensor:
    if batch.reference is None:
        raise TrainingError("beta is set, and the answers bring no log-probabilities of a reference")
    return batch.reference
