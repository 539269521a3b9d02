"""Distillation: a student learns a teacher's whole distribution of the next token.

Shape letters: N tokens, D and H hidden widths of student and teacher, V vocabulary, C tokens of a chunk.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from kajiya.config.options import DistillLoss
from kajiya.data.batch import Batch
from kajiya.errors import ConfigError
from kajiya.models.adapter_files import is_adapter, is_mergeable
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.models.load import DTYPES, load_model
from kajiya.models.open import open_model
from kajiya.training.losses import Terms
from kajiya.training.losses.next_token import unit_of
from kajiya.training.losses.preference import log1mexp
from kajiya.training.losses.sequences import split_head
from kajiya.training.teacher import CachedTeacher


def load_teacher(
    options: DistillLoss, device: torch.device, cached: CachedTeacher | None = None, n_tokens: int | None = None
) -> dict[str, Any]:
    """The teacher of `options.teacher`, frozen, in evaluation mode on the device; or what was `cached` of it.

    `n_tokens`: tokens of the tokenizer that teacher and student share, where it is known to be one.
    """
    return {"teacher": open_teacher(options, device) if cached is None else cached, "n_tokens": n_tokens}


def open_teacher(options: DistillLoss, device: torch.device) -> Any:
    """The teacher itself."""
    if not options.teacher:
        raise ConfigError("train.loss.options.teacher", "is not set", "Give the folder or hub name of the teacher.")
    path, dtype = Path(options.teacher), DTYPES[options.teacher_dtype]
    if is_adapter(path):
        teacher = open_model(path, dtype, is_merged=is_mergeable(path))
    else:
        teacher = load_model(options.teacher, options.teacher_revision, dtype)
    return teacher.requires_grad_(False).to(device)


def distill(
    model: Any, batch: Batch, options: DistillLoss, teacher: Any, n_tokens: int | None = None
) -> tuple[Terms, Terms]:
    """teacher_weight · T² · divergence from the teacher + (1 − teacher_weight) · cross-entropy of the targets, in nats.

    Both distributions are softened by the temperature T, whose square keeps the gradient's scale (Hinton et al.,
    arXiv:1503.02531, section 2). Forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), jsd the generalized
    Jensen–Shannon divergence of `jsd_teacher_share` (Agarwal et al., GKD, arXiv:2306.13649, equation 1). Of a teacher of which
    the most probable tokens alone are known, all others are one outcome, in both distributions. Both are distributions of the
    `n_tokens` that their tokenizer has; what heads have behind these, to fill them up, is left out.
    """
    wanted_N = batch.places
    with torch.no_grad():
        taught, n_taught = _taught(teacher, batch, wanted_N, options.temperature, n_tokens)
    own = _states(model, batch, wanted_N, n_tokens)
    if _vocab_size(own) != n_taught:
        raise ConfigError(
            "train.loss.options.teacher",
            f"has a vocabulary of {n_taught:,} tokens, the student of {_vocab_size(own):,}",
            f"Set tokenizer.path={options.teacher}, so that both read the same tokens.",
        )
    targets_N = batch.targets.reshape(-1)[wanted_N]
    weights_N = torch.ones_like(targets_N, dtype=torch.float32)
    if batch.weights is not None:
        weights_N = batch.weights.reshape(-1)[wanted_N]
    sums = torch.zeros(2, device=targets_N.device)
    with torch.autocast(sums.device.type, enabled=False):
        for begin in range(0, len(wanted_N), options.chunk_tokens):
            part = slice(begin, begin + options.chunk_tokens)
            given = (own[0][part], own[1], targets_N[part], weights_N[part])
            sums = sums + checkpoint(_chunk, *given, taught(part), options, use_reentrant=False)
    divergence, nll = sums
    total = options.teacher_weight * options.temperature**2 * divergence + (1 - options.teacher_weight) * nll
    unit = unit_of(batch)
    metrics: Terms = {
        "loss": (total.detach(), unit),
        "divergence": (divergence.detach(), unit),
        "nll": (nll.detach(), unit),
    }
    return {"loss": (total, unit)}, metrics


_Compare = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From the student's log-probabilities of all tokens [C, V]: the teacher's and the student's over what is compared, [C, k]."""


def _taught(
    teacher: Any, batch: Batch, wanted_N: torch.Tensor, temperature: float, n_tokens: int | None
) -> tuple[Callable[[slice], _Compare], int]:
    """What compares a part of the wanted positions with the teacher, and the size of the teacher's vocabulary."""
    if not isinstance(teacher, CachedTeacher):
        states_ND, head_VD = _states(teacher, batch, wanted_N, n_tokens)

        def beside(part: slice) -> _Compare:
            return lambda log_q_CV: (
                log_softmax(_logits(states_ND[part], head_VD) / temperature, dim=1),
                log_q_CV,
            )

        return beside, _vocab_size((states_ND, head_VD))
    if batch.sources is None:
        raise AssertionError("the rows of text do not say where they are from")
    known = None if batch.layout is None else batch.layout.sources
    sources_N = batch.sources.reshape(-1)[wanted_N.cpu()] if known is None else known
    ids_NK, log_p_NK = teacher.look_up(sources_N, wanted_N.device)

    def kept(part: slice) -> _Compare:
        log_p_CK = _with_rest(log_p_NK[part])
        return lambda log_q_CV: (log_p_CK, _with_rest(log_q_CV.gather(1, ids_NK[part])))

    return kept, teacher.vocab_size


def _with_rest(log_p_CK: torch.Tensor) -> torch.Tensor:
    """The log-probability of all other tokens together behind those of some; [C, k + 1]."""
    rest_C1 = log1mexp(log_p_CK.logsumexp(dim=1, keepdim=True).clamp(max=0))
    return torch.cat([log_p_CK, rest_C1], dim=1)


def _states(
    model: Any, batch: Batch, wanted_N: torch.Tensor, n_tokens: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states of the wanted positions, and the head of the first `n_tokens` (`None`: all); of a module that has no such
    parts, its logits and `None`."""
    if has_split_head(model):
        states_ND, head_VD = split_head(model, batch, wanted_N)
        return states_ND, head_VD[:n_tokens]
    return all_logits(model, batch).flatten(0, 1).index_select(0, wanted_N)[:, :n_tokens], None


def _vocab_size(states: tuple[torch.Tensor, torch.Tensor | None]) -> int:
    hidden_ND, head_VD = states
    return hidden_ND.shape[1] if head_VD is None else head_VD.shape[0]


def _logits(states_CD: torch.Tensor, head_VD: torch.Tensor | None) -> torch.Tensor:
    return (states_CD if head_VD is None else states_CD @ head_VD.T).float()


def _chunk(
    own_CD: torch.Tensor,
    own_head_VD: torch.Tensor | None,
    targets_C: torch.Tensor,
    weights_C: torch.Tensor,
    compare: _Compare,
    options: DistillLoss,
) -> torch.Tensor:
    """Weighted sums of divergence and cross-entropy over a chunk; [2]."""
    own_CV = _logits(own_CD, own_head_VD)
    log_p_CK, log_q_CK = compare(log_softmax(own_CV / options.temperature, dim=1))
    divergence_C = _DIVERGENCES[options.divergence](log_p_CK, log_q_CK, options.jsd_teacher_share)
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
