"""What theory has for the first loss of a head over whole texts: its formula on what the head says, and that a new one says little.

Shape letters: E examples, S sequences, C classes; m margins, y labels.
"""

import math
from typing import Any

import torch
from torch.nn.functional import huber_loss, log_softmax, softplus

from kajiya.evals.scoring import evaluation_mode
from kajiya.preflight.expected import STD_REMEDY, Expected, Theory, is_random, loss_options
from kajiya.preflight.logits import batch_logits
from kajiya.preflight.subject import Subject

_ROUNDING = 1e-3
"""Share of the value, and least difference, by which two computations of one formula on the same outputs may differ."""
_SPREADS = 4.0
"""Standard deviations that no output of a new head is away from zero."""


def of_rewards(subject: Subject, batch: Any) -> Theory:
    """Bradley–Terry: the mean of log(1 + exp(m − d)) + centering · (r⁺ + r⁻)², d = r⁺ − r⁻ of the head's own rewards.

    A new head's weights have the standard deviation σ (`model.init_std`), and the D states that they meet are of size 1: its
    rewards are normal with the deviation σ√D, and differ by hardly more than t = 4σ√D. So the loss lies between log(1 + exp(m − t))
    and log(1 + exp(m + t)) (and centering · (2t)² above), around ln 2 where no margins are given.
    """
    options, rewards_S = loss_options(subject), _outputs(subject, batch).squeeze(-1)
    chosen_E, rejected_E = rewards_S[0::2], rewards_S[1::2]
    margins_E = torch.zeros_like(chosen_E) if batch.labels is None else batch.labels.double()
    squares_E = options.centering * (chosen_E + rejected_E).square()
    value = float((softplus(margins_E - (chosen_E - rejected_E)) + squares_E).mean())
    own = _formula(value, "Bradley–Terry of the rewards that the head gives")
    spread = _new_spread(subject)
    if spread is None:
        return (own,)
    most = _SPREADS * spread
    alike, low, high = (float(softplus(margins_E + each).mean()) for each in (0.0, -most, most))
    words = f"near {alike:.3f}, as of a new head, whose rewards are alike"
    return own, Expected(low, high + options.centering * (2 * most) ** 2, words, STD_REMEDY)


def of_values(subject: Subject, batch: Any) -> Theory:
    """Regression: the mean of h(v − y), h the square or Huber's loss, of the head's own outputs v.

    A new head's outputs are normal with the deviation σ√D, and so of a root mean square of at most t = 4σ√D. The loss is then near
    that of a model that says 0: by the triangle inequality √loss within t of √(mean y²); Huber's, whose slope is at most 2δ,
    within 2δt of mean h(y).
    """
    delta = loss_options(subject).huber_delta
    values_E, labels_E = _outputs(subject, batch).squeeze(-1), batch.labels.double()
    own = _formula(_error(values_E, labels_E, delta), "the error of what the head says")
    spread = _new_spread(subject)
    if spread is None:
        return (own,)
    nothing, most = _error(torch.zeros_like(labels_E), labels_E, delta), _SPREADS * spread
    root = math.sqrt(nothing)
    low, high = max(0.0, root - most) ** 2, (root + most) ** 2
    if delta is not None:
        low, high = nothing - 2 * delta * most, nothing + 2 * delta * most
    words = f"near {nothing:.3f}, as of a new head, which says about 0"
    return own, Expected(low - _ROUNDING, high + _ROUNDING, words, STD_REMEDY)


def of_classes(subject: Subject, batch: Any) -> Theory:
    """Classification: the mean of (1 − ε) · −log p(y) + ε · mean over the classes of −log p, of the head's own logits.

    A new head beside random weights is about as good as guessing: ln C.
    """
    smoothing, labels_E = loss_options(subject).label_smoothing, batch.labels.long()
    log_p_EC = log_softmax(_outputs(subject, batch), dim=1)
    nll_E = -log_p_EC.gather(1, labels_E[:, None]).squeeze(1)
    value = float(((1 - smoothing) * nll_E - smoothing * log_p_EC.mean(dim=1)).mean())
    own = _formula(value, "the cross-entropy of what the head says")
    if not is_random(subject):
        return (own,)
    uniform = math.log(len(subject.corpus.facts["classes"]))
    words = f"near ln C = {uniform:.2f}, as of random weights"
    return own, Expected(0.5 * uniform, 1.25 * uniform + 0.8, words, STD_REMEDY)


def _formula(value: float, words: str) -> Expected:
    rounding = _ROUNDING * (1 + abs(value))
    remedy = "This is a fault of the loss, or of the head that it reads, not of the config."
    return Expected(value - rounding, value + rounding, f"{value:.3f}, {words}", remedy)


def _error(values_E: torch.Tensor, labels_E: torch.Tensor, delta: float | None) -> float:
    """Mean squared error; with `delta` twice Huber's loss, which is the square up to there."""
    if delta is None:
        return float((values_E - labels_E).square().mean())
    return 2 * float(huber_loss(values_E, labels_E, delta=delta))


def _new_spread(subject: Subject) -> float | None:
    """Standard deviation of the outputs of a new head beside random weights; `None` of other weights.

    Nor is it known of encoder–decoders: those of T5's kind draw the weights of their heads by a rule of their own.
    """
    config: Any = subject.setup.model.config
    if not is_random(subject) or config.is_encoder_decoder:
        return None
    return subject.config.model.init_std * math.sqrt(config.hidden_size)


@torch.no_grad()
def _outputs(subject: Subject, batch: Any) -> torch.Tensor:
    """What the head says of each sequence, float64 [S, C] on the CPU."""
    setup = subject.setup
    device = setup.strategy.device
    with evaluation_mode(setup.model), setup.precision.context(device):
        return batch_logits(setup.model, batch.to(device), subject.config).cpu().double()
