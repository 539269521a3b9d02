"""Check of the loss before the first step: what theory expects of each loss, and an adapter that begins as nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kajiya.data.batch import Batch, RolloutBatch
from kajiya.evals.scoring import evaluation_mode
from kajiya.models.adapt import adapter_off, has_adapter
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.preflight.expected import NOT_THE_BASE, STD_REMEDY, Expected, Theory, is_random, loss_options
from kajiya.preflight.first_loss_heads import of_classes, of_rewards, of_values
from kajiya.preflight.first_loss_teacher import of_a_student
from kajiya.preflight.logits import batch_logits
from kajiya.preflight.portion import first_batch
from kajiya.preflight.prove_policy import check_policy_start
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped
from kajiya.training.fit import Setup
from kajiya.training.losses import Terms
from kajiya.training.losses.sequences import split_head

_OF_SUMS, _PER_TOKEN = 0.4, 0.02
"""Rounding of a difference of log-probabilities, nats: of whole sequences, and of their tokens' means."""


def check_start(subject: Subject) -> Finding:
    """The loss before the first step is what theory expects, and an adapter begins as its base."""
    setup = subject.setup
    batch = first_batch(setup)
    identity = _identity(subject, batch)
    if identity is not None and identity.state == "failed":
        return identity
    changed = _behind_the_head(setup, batch)
    if changed is not None:
        return changed
    said = "" if identity is None else f"; {identity.text}"
    terms = _terms_on(setup, batch)
    if not all(math.isfinite(each) for each in terms.values()):
        return failed(f"the first loss is not finite: {terms}", "Look at the weights, and set train.precision=fp32.")
    if isinstance(batch, RolloutBatch):
        return check_policy_start(subject, batch, said)
    loss = terms["loss"] if "loss" in terms else sum(terms.values())
    theory = _theory(subject, batch)
    if isinstance(theory, Finding):
        if theory.state == "failed":
            return theory
        text = f"the first loss is {loss:.3f}, of which theory says nothing here: {theory.text}{said}"
        is_proven = identity is not None and identity.state == "passed"
        return passed(text, loss=loss) if is_proven else skipped(text, loss=loss)
    for expected in theory:
        if not expected.low <= loss <= expected.high:
            return failed(f"the first loss is {loss:.3f}, and not {expected.words}", expected.remedy, loss=loss)
    words = "; ".join(expected.words for expected in theory)
    return passed(f"the first loss is {loss:.3f}: {words}{said}", loss=loss)


def loss_on(setup: Setup, batch: Any) -> float:
    """Mean of the loss's terms on one batch, dropout off."""
    return sum(_terms_on(setup, batch).values())


@torch.no_grad()
def _terms_on(setup: Setup, batch: Any) -> dict[str, float]:
    device = setup.strategy.device
    placed = batch.to(device)
    with evaluation_mode(setup.model), setup.precision.context(device):
        if setup.measure is not None:
            measured = _means(setup.measure(setup.model, placed), placed)
            placed = replace(placed, measured=measured)
        terms, _ = setup.loss(setup.model, placed)
    return _means(terms, placed)


def _means(terms: Terms, batch: Any) -> dict[str, float]:
    return {name: float(value) / (_number(count, batch) or math.nan) for name, (value, count) in terms.items()}


def _number(count: Any, batch: Any) -> float:
    return float(batch.counts[count]) if isinstance(count, str) else float(count)


# ---------------------------------------------------------------- what theory says


def _theory(subject: Subject, batch: Any) -> Theory:
    name = subject.config.train.loss.name
    if ":" in name:
        return skipped("the loss is the user's own")
    if ":" in subject.config.model.name:
        return skipped("the model is the user's own")
    return AT_FIRST[name](subject, batch)


def _guessing(subject: Subject, batch: Any) -> tuple[Expected]:
    """Of tokens: as good as guessing from scratch, better where the weights know something."""
    uniform = math.log(len(subject.tokenizer))
    if not is_random(subject):
        remedy = (
            "It is no better than guessing: is the tokenizer that of the weights? Set tokenizer.path to model.path."
        )
        return (Expected(-math.inf, uniform, f"below ln V = {uniform:.2f}, as of weights that know this text", remedy),)
    # Logits of a spread as wide as the initial weights make them add half their variance.
    words = f"near ln V = {uniform:.2f}, as of random weights"
    return (Expected(0.8 * uniform, 1.25 * uniform + 0.5, words, STD_REMEDY),)


def _own_reference(subject: Subject, batch: Any) -> Theory:
    """DPO and its kin: the margin of log-ratios is zero."""
    if subject.config.adapter.name in ("prefix", "prompt"):
        return _other_from_the_start(subject)
    options = loss_options(subject)
    beta, smoothing = options.beta, options.label_smoothing
    value, slope, is_per_token = {
        "sigmoid": (math.log(2), beta / 2, False),
        "sigmoid_norm": (math.log(2), beta / 2, True),
        "robust": (math.log(2), beta / 2 / (1 - 2 * smoothing), False),
        "hinge": (1.0, beta, False),
        "ipo": (1 / (4 * beta**2), 1 / beta, True),
    }[options.kind]
    return _itself(value, slope * (_PER_TOKEN if is_per_token else _OF_SUMS))


def _feedback(subject: Subject, batch: Any) -> Theory:
    """KTO: ratios and reference point are zero, each example costs half its weight."""
    if subject.config.adapter.name in ("prefix", "prompt"):
        return _other_from_the_start(subject)
    options = loss_options(subject)
    share = float((batch.labels > 0.5).float().mean())
    value = 0.5 * (share * options.desirable_weight + (1 - share) * options.undesirable_weight)
    return _itself(value, options.beta * value * _OF_SUMS)


def _other_from_the_start(subject: Subject) -> Finding:
    return skipped(f"with {subject.config.adapter.name} the model is another than its reference from the start")


def _itself(value: float, rounding: float) -> tuple[Expected]:
    tolerance = 1e-3 + rounding
    remedy = "The reference is of another model or of other rows."
    return (
        Expected(value - tolerance, value + tolerance, f"{value:.3f} of a model that is its own reference", remedy),
    )


def _odds(subject: Subject, batch: Any) -> tuple[Expected]:
    """ORPO: the chosen answer's own loss, and the weight of odds that are even."""
    (found,), beta = _guessing(subject, batch), loss_options(subject).beta
    # Odds that are not even may cost their weight for each nat.
    return (replace(found, high=found.high + beta * math.log(2) + beta, words=f"{found.words}, and even odds"),)


def _even_means(subject: Subject, batch: Any) -> Theory:
    """SimPO: random weights find no answer likelier than another, which leaves −log σ(−γ)."""
    if not is_random(subject):
        return skipped("which answers trained weights find likelier is not known, and there is no reference")
    options = loss_options(subject)
    value, tolerance = math.log1p(math.exp(options.gamma)), 0.25 * options.beta
    words = f"near {value:.3f} of answers that are all alike"
    return (Expected(value - tolerance, value + tolerance, words, STD_REMEDY),)


AT_FIRST: Mapping[str, Callable[[Subject, Any], Theory]] = {
    "next_token": _guessing,
    "distill": of_a_student,
    "masked_lm": _guessing,
    "seq2seq": _guessing,
    "dpo": _own_reference,
    "kto": _feedback,
    "orpo": _odds,
    "simpo": _even_means,
    "reward": of_rewards,
    "classify": of_classes,
    "regress": of_values,
}
"""By loss. Of a policy's, whether its answers were drawn from the model that is trained is looked at in its place."""


# ---------------------------------------------------------------- adapters and heads


@torch.no_grad()
def _identity(subject: Subject, batch: Any) -> Finding | None:
    """Whether the model with its adapter is its base; `None` where there is no adapter that could be."""
    setup, config = subject.setup, subject.config
    if not has_adapter(setup.model):
        return None
    if config.adapter.name in NOT_THE_BASE:
        return skipped(f"{config.adapter.name} changes what the base says from the start")
    setup.model.eval()
    placed = batch.to(setup.strategy.device)
    with setup.precision.context(setup.strategy.device):
        found = batch_logits(setup.model, placed, config)
        with adapter_off(setup.model):
            expected = batch_logits(setup.model, placed, config)
    difference = float((found - expected).abs().max())
    limit = 1e-3 if setup.precision.name == "fp32" else 0.1
    if not difference <= limit:
        return failed(
            f"the adapter changes what the model says by {difference:.2g} before it has learnt anything",
            "Set adapter.options.init=default.",
        )
    return passed(f"the adapter begins as nothing (largest change of a logit {difference:.1g})")


@torch.no_grad()
def _behind_the_head(setup: Setup, batch: Any) -> Finding | None:
    """A finding where the model makes something else of its head's products than the losses do, which take them as logits."""
    if not isinstance(batch, Batch) or not batch.is_causal or not has_split_head(setup.model):
        return None
    setup.model.eval()
    placed = batch.to(setup.strategy.device)
    with setup.precision.context(setup.strategy.device):
        hidden_ND, head_VD = split_head(setup.model, placed)
        logits_NV, products_NV = all_logits(setup.model, placed).flatten(0, 1), hidden_ND @ head_VD.T
    difference = float((logits_NV - products_NV).float().abs().max())
    # Rounding is of the size of what is rounded.
    if difference <= (1e-4 if setup.precision.name == "fp32" else 2e-2) * max(1.0, float(products_NV.abs().max())):
        return None
    return failed(
        f"the model's logits differ by {difference:.2g} from the products of its head, which are what is trained",
        "This architecture changes them behind its head, and is not known to: kajiya.models.hidden must name the field.",
        difference=difference,
    )
