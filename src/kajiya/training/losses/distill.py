"""Distillation: a student learns a teacher's whole distribution of the next token.

Shape letters: N tokens, D and H hidden widths of student and teacher, V vocabulary, C tokens of a chunk.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from kajiya.config.options import DistillLoss
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import ConfigError
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.models.load import load_model
from kajiya.training.losses import Terms
from kajiya.training.losses.next_token import unit_of
from kajiya.training.losses.sequences import split_head


def load_teacher(options: DistillLoss, device: torch.device) -> dict[str, Any]:
    """The teacher of `options.teacher`, frozen, in evaluation mode on the device, in the dtype its folder is stored in."""
    if not options.teacher:
        raise ConfigError("train.loss.options.teacher", "is not set", "Give the folder or hub name of the teacher.")
    teacher = load_model(options.teacher, options.teacher_revision)
    return {"teacher": teacher.requires_grad_(False).to(device)}


def distill(model: Any, batch: Batch, options: DistillLoss, teacher: Any) -> tuple[Terms, Terms]:
    """teacher_weight · T² · divergence from the teacher + (1 − teacher_weight) · cross-entropy of the targets, in nats.

    Both distributions are softened by the temperature T, whose square keeps the gradient's scale (Hinton et al.,
    arXiv:1503.02531, section 2). Forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), jsd the generalized
    Jensen–Shannon divergence of `jsd_teacher_share` (Agarwal et al., GKD, arXiv:2306.13649, equation 1).
    """
    wanted_N = (batch.targets.reshape(-1) != NO_TARGET).nonzero().squeeze(1)
    with torch.no_grad():
        taught = _states(teacher, batch, wanted_N)
    own = _states(model, batch, wanted_N)
    if _vocab_size(own) != _vocab_size(taught):
        raise ConfigError(
            "train.loss.options.teacher",
            f"has a vocabulary of {_vocab_size(taught):,} tokens, the student of {_vocab_size(own):,}",
            f"Set tokenizer.path={options.teacher}, so that both read the same tokens.",
        )
    targets_N = batch.targets.reshape(-1)[wanted_N]
    weights_N = torch.ones_like(targets_N, dtype=torch.float32)
    if batch.weights is not None:
        weights_N = batch.weights.reshape(-1)[wanted_N]
    sums = torch.zeros(2, device=targets_N.device)
    with torch.autocast(sums.device.type, enabled=False):
        for rows in torch.arange(len(wanted_N)).split(options.chunk_tokens):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            given = (own[0][part], own[1], taught[0][part], taught[1], targets_N[part], weights_N[part])
            sums = sums + checkpoint(_chunk, *given, options, use_reentrant=False)
    divergence, nll = sums
    total = options.teacher_weight * options.temperature**2 * divergence + (1 - options.teacher_weight) * nll
    unit = unit_of(batch)
    metrics: Terms = {
        "loss": (total.detach(), unit),
        "divergence": (divergence.detach(), unit),
        "nll": (nll.detach(), unit),
    }
    return {"loss": (total, unit)}, metrics


def _states(model: Any, batch: Batch, wanted_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states of the wanted positions, and the head; of a module that has no such parts, its logits and `None`."""
    if has_split_head(model):
        hidden_ND, head_VD = split_head(model, batch)
        return hidden_ND.index_select(0, wanted_N), head_VD
    return all_logits(model, batch).flatten(0, 1).index_select(0, wanted_N), None


def _vocab_size(states: tuple[torch.Tensor, torch.Tensor | None]) -> int:
    hidden_ND, head_VD = states
    return hidden_ND.shape[1] if head_VD is None else head_VD.shape[0]


def _logits(states_CD: torch.Tensor, head_VD: torch.Tensor | None) -> torch.Tensor:
    return (states_CD if head_VD is None else states_CD @ head_VD.T).float()


def _chunk(
    own_CD: torch.Tensor,
    own_head_VD: torch.Tensor | None,
    taught_CH: torch.Tensor,
    taught_head_VH: torch.Tensor | None,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor,
    options: DistillLoss,
) -> torch.Tensor:
    """Weighted sums of divergence and cross-entropy over a chunk; [2]."""
    own_CV, taught_CV = _logits(own_CD, own_head_VD), _logits(taught_CH, taught_head_VH)
    log_q_CV = log_softmax(own_CV / options.temperature, dim=1)
    log_p_CV = log_softmax(taught_CV / options.temperature, dim=1)
    divergence_C = _DIVERGENCES[options.divergence](log_p_CV, log_q_CV, options.jsd_teacher_share)
    nll_C = cross_entropy(own_CV, targets_C, reduction="none")
    return torch.stack([(divergence_C * weights_C).sum(), (nll_C * weights_C).sum()])


def _kl(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor) -> torch.Tensor:
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(dim=1)


def _jsd(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, share: float) -> torch.Tensor:
    """share · KL(p ‖ m) + (1 − share) · KL(q ‖ m), m = share · p + (1 − share) · q."""
    log_m_CV = torch.logaddexp(log_p_CV + math.log(share), log_q_CV + math.log1p(-share))
    return share * _kl(log_p_CV, log_m_CV) + (1 - share) * _kl(log_q_CV, log_m_CV)


_DIVERGENCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward": lambda log_p, log_q, _share: _kl(log_p, log_q),
    "reverse": lambda log_p, log_q, _share: _kl(log_q, log_p),
    "jsd": _jsd,
}
"""Divergence per token of the teacher's p and the student's q."""
