"""Checks that take a few steps: accumulation, the loss at the start, whether it falls at all."""

import math
from dataclasses import replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, RolloutBatch
from kajiya.models.adapt import adapter_off, has_adapter
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.preflight.joining import can_join, joined, with_fewer
from kajiya.preflight.portion import Repeated, first_batch, portion, restore_dropout, without_dropout
from kajiya.preflight.prove_policy import check_policy_learning, check_policy_start
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped
from kajiya.training.fit import Setup, train_step
from kajiya.training.losses.sequences import split_head
from kajiya.training.state import TrainState

_ACCUMULATION_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "bf16-mixed": 5e-2, "fp16-mixed": 2e-2, "fp8": 0.1}
"""Largest norm of the difference of the gradients over their norm. A mean of means is off by tenths."""
_STEPS = 20


def check_accumulation(subject: Subject) -> Finding:
    """One step's gradient is that of all its targets together, however they are cut into micro-batches."""
    setup = subject.setup
    changed = without_dropout(setup.model)
    try:
        first, second = _uneven(first_batch(setup), setup)
        apart = _gradients(setup, [first, second])
        if can_join(first):
            together = _gradients(setup, [joined(first, second)])
        else:
            together = _gradients_of_sums(setup, [first, second])
    finally:
        restore_dropout(changed)
    norm = math.sqrt(sum(float(each.square().sum()) for each in together.values()))
    difference = math.sqrt(sum(float((apart[name] - together[name]).square().sum()) for name in together))
    share = difference / norm if norm else float("inf")
    # LLM.int8 rounds activations by what else is in the batch.
    limit = 0.1 if subject.config.model.quantize == "int8" else _ACCUMULATION_TOLERANCE[setup.precision.name]
    if not share <= limit:
        return failed(
            f"the gradient of two micro-batches is not that of both together: they differ by {share:.1%} of its norm",
            "The loss is not a sum over what it counts: a mean of means weighs targets by their micro-batch.",
            difference=share,
        )
    return passed(
        f"1 × 2 and 2 × 1 micro-batches give one gradient (differing by {share:.1g} of its norm)", difference=share
    )


def _uneven(batch: Any, setup: Setup) -> tuple[Any, Any]:
    """Two micro-batches with unlike numbers of targets, which a mean of means would weigh wrongly."""
    if not isinstance(batch, Batch) or len(batch.tokens) < 2:
        position = setup.loader.state()
        pair = [portion(setup.loader.next()) for _ in range(2)]
        setup.loader.load_state(position)
        if not isinstance(batch, Batch):
            return pair[0], with_fewer(pair[1])
        batch = joined(*(portion(each, rows=1) for each in pair))
    first, second = (_row(batch, index) for index in (0, 1))
    targets = second.targets.clone()
    kept = (targets != NO_TARGET).cumsum(1)
    targets[kept > max(1, int(kept.max()) // 3)] = NO_TARGET
    second = replace(second, targets=targets, n_targets=int((targets != NO_TARGET).sum()))
    return first, second.with_future(len(batch.future))


def _row(batch: Batch, index: int) -> Batch:
    targets = batch.targets[index : index + 1]
    row = replace(
        batch,
        tokens=batch.tokens[index : index + 1],
        targets=targets,
        positions=batch.positions[index : index + 1],
        segments=batch.segments[index : index + 1],
        n_targets=int((targets != NO_TARGET).sum()),
        weights=None if batch.weights is None else batch.weights[index : index + 1],
        sources=None if batch.sources is None else batch.sources[index : index + 1],
    )
    return row.with_future(len(batch.future))


class _Caught:
    """The setup's strategy, which hands the gradients over in the place of a step."""

    def __init__(self, setup: Setup) -> None:
        self._inner = setup.strategy
        self.gradients: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def clip(self, optimizer: Any, max_norm: float | None) -> torch.Tensor:
        """Keep the gradients as they are; nothing is scaled."""
        self.gradients = _taken(optimizer.parameters)
        return torch.zeros(())

    def step(self, optimizer: Any, lr: float) -> None:
        """No update."""
        optimizer.clear_grads()


def _taken(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.grad.detach().float().clone() for name, each in parameters.items() if each.grad is not None}


def _gradients(setup: Setup, batches: list[Any]) -> dict[str, torch.Tensor]:
    """As the loop itself makes them."""
    strategy = _Caught(setup)
    loader: Any = Repeated(batches)
    caught: Any = strategy
    train_step(
        replace(setup, loader=loader, accumulate=len(batches), strategy=caught, row_growth=(), steps=1), TrainState()
    )
    return strategy.gradients


def _gradients_of_sums(setup: Setup, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Of the sums over all batches, divided by the counts over all: the definition, without the loop."""
    device = setup.strategy.device
    sums: dict[str, Any] = {}
    counts: dict[str, float] = {}
    for batch in batches:
        with setup.precision.context(device):
            terms, _ = setup.loss(setup.model, batch.to(device))
        for name, (value, count) in terms.items():
            number = batch.counts[count] if isinstance(count, str) else float(count)
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0.0) + number
    torch.stack([sums[name] / counts[name] for name in sums]).sum().backward()
    taken = _taken(setup.optimizer.parameters)
    setup.optimizer.clear_grads()
    return taken


@torch.no_grad()
def loss_on(setup: Setup, batch: Any) -> float:
    """Mean of the loss's terms on one batch, dropout off."""
    changed = without_dropout(setup.model)
    try:
        device = setup.strategy.device
        placed = batch.to(device)
        if setup.measure is not None:
            terms = setup.measure(setup.model, placed)
            means = {name: float(value) / _number(count, placed) for name, (value, count) in terms.items()}
            placed = replace(placed, measured=means)
        with setup.precision.context(device):
            terms, _ = setup.loss(setup.model, placed)
        return sum(float(value) / (_number(count, placed) or math.nan) for value, count in terms.values())
    finally:
        restore_dropout(changed)


def _number(count: Any, batch: Any) -> float:
    return float(batch.counts[count]) if isinstance(count, str) else float(count)


def check_start(subject: Subject) -> Finding:
    """The loss before the first step is what theory expects, and an adapter begins as its base."""
    setup, config = subject.setup, subject.config
    batch = first_batch(setup)
    identity = _identity(subject, batch)
    if identity is not None and identity.state == "failed":
        return identity
    changed = _behind_the_head(setup, batch)
    if changed is not None:
        return changed
    said = "" if identity is None else f"; {identity.text}"
    loss = loss_on(setup, batch)
    if not math.isfinite(loss):
        return failed(f"the first loss is {loss}", "Look at the weights, and set train.precision=fp32.", loss=loss)
    if isinstance(batch, RolloutBatch):
        return check_policy_start(subject, batch, said)
    name = config.train.loss.name
    if name == "dpo" and config.train.loss.options.get("kind", "sigmoid") in ("sigmoid", "sigmoid_norm"):
        expected = math.log(2)
        if abs(loss - expected) > 0.02 and config.adapter.name not in ("prefix", "prompt"):
            return failed(
                f"the first loss is {loss:.3f}, and ln 2 = {expected:.3f} where the model is its own reference",
                "The reference is of another model or of other rows.",
                loss=loss,
            )
        return passed(f"the first loss is {loss:.3f}, as of a model that is its own reference{said}", loss=loss)
    if name not in ("next_token", "masked_lm", "seq2seq") or ":" in config.model.name:
        return passed(f"the first loss is {loss:.3f}; theory says nothing of {name}{said}", loss=loss)
    uniform = math.log(len(subject.tokenizer))
    if config.model.path is not None or config.model.init != "normal":
        if loss >= uniform:
            return failed(
                f"the first loss is {loss:.2f}, no better than guessing among all tokens ({uniform:.2f}): these "
                "weights know nothing of this text",
                "Is the tokenizer that of the weights? Set tokenizer.path to model.path.",
                loss=loss,
            )
        return passed(f"the first loss is {loss:.2f}, below ln V = {uniform:.2f}{said}", loss=loss)
    # Logits of a spread as wide as the initial weights make them add half their variance.
    if not 0.8 * uniform <= loss <= 1.25 * uniform + 0.5:
        return failed(
            f"the first loss is {loss:.2f}, and ln V = {uniform:.2f} where weights are random",
            "Look at model.init_std: larger ones make a model sure of nonsense.",
            loss=loss,
        )
    return passed(f"the first loss is {loss:.2f}, and ln V = {uniform:.2f}{said}", loss=loss)


@torch.no_grad()
def _identity(subject: Subject, batch: Any) -> Finding | None:
    """Whether the model with its adapter is its base; `None` where there is no adapter that could be."""
    setup, adapter = subject.setup, subject.config.adapter
    if not has_adapter(setup.model) or not isinstance(batch, Batch) or not batch.is_causal:
        return None
    if adapter.name in ("prefix", "prompt", "load"):
        return skipped(f"{adapter.name} changes what the base says from the start")
    setup.model.eval()
    placed = batch.to(setup.strategy.device)
    with setup.precision.context(setup.strategy.device):
        found = all_logits(setup.model, placed).float()
        with adapter_off(setup.model):
            expected = all_logits(setup.model, placed).float()
    difference = float((found - expected).abs().max())
    limit = 1e-3 if setup.precision.name == "fp32" else 0.1
    if not difference <= limit:
        return failed(
            f"the adapter changes a logit by {difference:.2g} before it has learnt anything",
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


def check_learning(subject: Subject) -> Finding:
    """Twenty steps on one batch lower its loss."""
    setup, peak = subject.setup, subject.config.optim.lr
    batch = first_batch(setup)
    if isinstance(batch, RolloutBatch):
        return check_policy_learning(subject, batch)
    before = loss_on(setup, batch)
    setup.model.train()
    loader: Any = Repeated([batch])
    state = TrainState()
    # A few steps of warm-up: a rate that is right for a whole run may be too much for the very first step.
    tried = replace(
        setup, loader=loader, accumulate=1, steps=_STEPS, lr=lambda step: peak * min(1.0, step / 8), row_growth=()
    )
    lowest = before
    for number in range(1, _STEPS + 1):
        train_step(tried, state)
        if number % 5 == 0:
            lowest = min(lowest, loss_on(setup, batch))
    if state.skipped:
        return failed(f"{state.skipped} of {_STEPS} steps had a gradient that is no number", "Lower optim.lr.")
    if not lowest < before:
        return failed(
            f"{_STEPS} steps on one batch do not lower its loss of {before:.4f}",
            "Lower optim.lr; if the loss does not move at all, see what is frozen (adapter).",
            before=before,
            after=lowest,
        )
    return passed(
        f"{_STEPS} steps on one batch take its loss from {before:.3f} to {lowest:.3f}", before=before, after=lowest
    )
