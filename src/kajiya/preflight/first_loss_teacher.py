"""What theory has for the first loss of a student: the formula on whole distributions, and that its teacher knows the text.

Shape letters: B rows, T tokens of a row, M positions that have a target, C of them at once, V vocabulary, k tokens that are kept of
a teacher.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import log_softmax

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.evals.scoring import evaluation_mode
from kajiya.models.hidden import all_logits
from kajiya.preflight.expected import NOT_THE_BASE, Expected, Theory, loss_options
from kajiya.preflight.subject import Subject, failed, skipped
from kajiya.training.losses import read_beside
from kajiya.training.teacher import CachedTeacher

_CHUNK = 32
_ROUNDING = {"fp32": 5e-3}
_ROUNDING_OF_FEW_BITS = 2e-2
"""By precision: share of the value, and least difference, by which two computations of one formula may differ."""
_KEPT_ROUNDING = 1e-6
"""How well the sum of the kept probabilities is known, and with it the probability of all other tokens."""
_LEAST = 1e-38


def of_a_student(subject: Subject, batch: Batch) -> Theory:
    """Distillation: teacher_weight · T² · D(p, q) + (1 − teacher_weight) · −log q(target), means over the targets, in nats.

    p and q are the teacher's and the student's distributions softened by the temperature T (Hinton et al., arXiv:1503.02531,
    section 2); D is Σ p log(p/q) (forward), Σ q log(q/p) (reverse), or w Σ p log(p/m) + (1 − w) Σ q log(q/m) of the mixture
    m = w p + (1 − w) q (jsd; Agarwal et al., arXiv:2306.13649, equation 1). Of a student that is its teacher D is 0. Of a
    teacher whose k most probable tokens are kept, the others are one outcome.

    A teacher that knows the text finds its tokens likelier than guessing: mean −log p(target) is below ln V.
    """
    options = loss_options(subject)
    if "teacher" not in read_beside(subject.setup.loss):
        return skipped("the teacher is not at hand")
    means = _means(subject, batch)
    teacher_nll = means["teacher"]
    uniform = math.log(len(subject.tokenizer))
    # What is kept of a teacher at a low temperature is surer than the teacher.
    if not teacher_nll < uniform and options.temperature >= 1:
        return failed(
            f"the teacher's own loss on this text is {teacher_nll:.3f}, no better than guessing (ln V = {uniform:.2f})",
            "Is the tokenizer that of the teacher? Set tokenizer.path to it, or take a teacher of this kind of text.",
        )
    is_itself = _is_its_teacher(subject, options)
    low, high = (0.0, 0.0) if is_itself else (means["low"], means["high"])
    share, square = options.teacher_weight, options.temperature**2
    low, high = (share * square * each + (1 - share) * means["nll"] for each in (low, high))
    rounding = _ROUNDING.get(subject.setup.precision.name, _ROUNDING_OF_FEW_BITS) * max(1.0, square)
    who = "a student that is its teacher" if is_itself else f"a teacher whose own loss is {teacher_nll:.3f}"
    words = f"{(low + high) / 2:.3f}, as beside {who}"
    remedy = "The loss reads another teacher, other rows or other weights than the config says."
    return (Expected(low - rounding * (1 + abs(low)), high + rounding * (1 + abs(high)), words, remedy),)


def _is_its_teacher(subject: Subject, options: Any) -> bool:
    """Whether the student's weights are the teacher's, to their rounding."""
    model, adapter = subject.config.model, subject.config.adapter
    is_same = (model.path, model.revision) == (options.teacher, options.teacher_revision)
    return is_same and model.quantize == "none" and adapter.name not in NOT_THE_BASE and ":" not in adapter.name


@torch.no_grad()
def _means(subject: Subject, batch: Batch) -> dict[str, float]:
    """Means over the targets: `low` and `high`, between which the divergence is; `teacher` and `nll`, −log p and −log q of them."""
    wanted_BT = batch.targets != NO_TARGET
    targets_M1 = batch.targets[wanted_BT][:, None]
    weights_M = torch.ones(len(targets_M1)) if batch.weights is None else batch.weights[wanted_BT]
    own_MV, compare = _logits(subject.setup.model, batch, subject), _comparison(subject, batch)
    sums = dict.fromkeys(("low", "high", "teacher", "nll"), 0.0)
    for part in torch.arange(len(targets_M1)).split(_CHUNK):
        own_CV = own_MV[part].double()
        nll_C = -log_softmax(own_CV, dim=1).gather(1, targets_M1[part]).squeeze(1)
        found = (*compare(part, own_CV, targets_M1[part]), nll_C)
        for name, values_C in zip(sums, found, strict=True):
            sums[name] += float((values_C * weights_M[part]).sum())
    return {name: value / float(weights_M.sum()) for name, value in sums.items()}


def _logits(model: Any, batch: Batch, subject: Subject) -> torch.Tensor:
    """Of the positions that have a target, float32 [M, V] on the CPU."""
    device = subject.setup.strategy.device
    with evaluation_mode(model), subject.setup.precision.context(device):
        logits_MV = all_logits(model, batch.to(device))[(batch.targets != NO_TARGET).to(device)]
    return logits_MV[:, : read_beside(subject.setup.loss)["n_tokens"]].float().cpu()


_Compared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Bounds of the divergence, and the teacher's −log p of the target, [C] each."""


def _comparison(subject: Subject, batch: Batch) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], _Compared]:
    """What compares some positions with the teacher, from their numbers [C], the student's logits [C, V] and the targets [C, 1]."""
    options, teacher = loss_options(subject), read_beside(subject.setup.loss)["teacher"]
    if not isinstance(teacher, CachedTeacher):
        theirs_MV = _logits(teacher, batch, subject)
        return lambda part, own_CV, targets_C1: _beside(theirs_MV[part].double(), own_CV, targets_C1, options)
    if batch.sources is None:
        raise AssertionError("the rows of text do not say where they are from")
    ids_Mk, log_p_Mk = teacher.look_up(batch.sources[batch.targets != NO_TARGET], torch.device("cpu"))
    return lambda part, own_CV, targets_C1: _beside_kept(
        (ids_Mk[part], log_p_Mk[part].double()), own_CV, targets_C1, options
    )


def _beside(theirs_CV: torch.Tensor, own_CV: torch.Tensor, targets_C1: torch.Tensor, options: Any) -> _Compared:
    p_CV, q_CV = ((each / options.temperature).softmax(dim=1) for each in (theirs_CV, own_CV))
    divergence_C = _DIVERGENCES[options.divergence](p_CV, q_CV, options.jsd_teacher_share)
    return divergence_C, divergence_C, -log_softmax(theirs_CV, dim=1).gather(1, targets_C1).squeeze(1)


def _beside_kept(
    kept: tuple[torch.Tensor, torch.Tensor], own_CV: torch.Tensor, targets_C1: torch.Tensor, options: Any
) -> _Compared:
    """What all other tokens have together is known to `_KEPT_ROUNDING`, of the teacher and of the student."""
    ids_Ck, p_Ck = kept[0], kept[1].exp()
    q_Ck = (own_CV / options.temperature).softmax(dim=1).gather(1, ids_Ck)
    ways = (-_KEPT_ROUNDING, _KEPT_ROUNDING)
    divergences = [
        _DIVERGENCES[options.divergence](
            _with_others(p_Ck, p_way), _with_others(q_Ck, q_way), options.jsd_teacher_share
        )
        for p_way in ways
        for q_way in ways
    ]
    bounds_4C = torch.stack(divergences)
    is_target_Ck = ids_Ck == targets_C1
    others_C1 = _with_others(p_Ck, 0.0)[:, -1:] / max(1, own_CV.shape[1] - ids_Ck.shape[1])
    p_C = torch.where(is_target_Ck.any(dim=1), (p_Ck * is_target_Ck).sum(dim=1), others_C1.squeeze(1))
    return bounds_4C.amin(dim=0), bounds_4C.amax(dim=0), -p_C.clamp(min=_LEAST).log()


def _with_others(p_Ck: torch.Tensor, way: float) -> torch.Tensor:
    """Behind the probabilities that of all other tokens, changed by `way`; [C, k + 1]."""
    return torch.cat([p_Ck, (1 - p_Ck.sum(dim=1, keepdim=True) + way).clamp(min=_LEAST)], dim=1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.clamp(min=_LEAST) / q.clamp(min=_LEAST)).log()).sum(dim=1)


def _jsd(p: torch.Tensor, q: torch.Tensor, share: float) -> torch.Tensor:
    mixed = share * p + (1 - share) * q
    return share * _kl(p, mixed) + (1 - share) * _kl(q, mixed)


_DIVERGENCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward": lambda p, q, _share: _kl(p, q),
    "reverse": lambda p, q, _share: _kl(q, p),
    "jsd": _jsd,
}
"""Of probabilities [C, …] of the teacher and of the student."""
