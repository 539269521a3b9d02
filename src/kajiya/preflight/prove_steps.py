"""Checks that take a few steps: one gradient however the batch is cut, and a loss that falls."""

import math
from dataclasses import replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, RolloutBatch
from kajiya.preflight.joining import can_join, in_two, joined, with_a_third, with_fewer
from kajiya.preflight.portion import (
    Repeated,
    dense_windows,
    first_batch,
    portion,
    restore_dropout,
    without_dropout,
)
from kajiya.preflight.prove_policy import check_policy_learning
from kajiya.preflight.prove_start import loss_on
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped
from kajiya.run.deferred import uncompiled
from kajiya.training.fit import Setup, train_step
from kajiya.training.losses.noise import without_noise
from kajiya.training.masters import MasterOptimizer
from kajiya.training.state import TrainState

_ACCUMULATION_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "bf16-mixed": 5e-2, "fp16-mixed": 2e-2, "fp8": 0.1}
"""Largest norm of the difference of the gradients over their norm. A mean of means is off by tenths."""
_ROUNDING = {"fp32": 1e-6, "bf16": 5e-4, "bf16-mixed": 1e-5, "fp16-mixed": 1e-5, "fp8": 1e-3}
"""Share of the loss that is rounding."""
_LEAST_FALL = {"fp32": 1e-4, "bf16": 1e-4, "bf16-mixed": 1e-4, "fp16-mixed": 1e-4, "fp8": 1e-3}
"""Share of the loss by which it must have fallen: a rate at which one batch teaches less teaches nothing."""
_OF_FEW = ("ia3", "prefix", "prompt", "load")
"""Adapters that may be of a few vectors, which move a loss by little at any rate: by more than rounding is enough."""
_STEPS = 20
_MORE_STEPS = 60
"""Where it has changed by no more than that."""
_ROUNDING_SCALE = 1.37
"""No power of two, so that a gradient of so many times the loss is rounded otherwise at every product."""
_MOST_ROUNDING = 0.2


def check_accumulation(subject: Subject) -> Finding:
    """One step's gradient is that of all its targets together, however they are cut into micro-batches."""
    setup = subject.setup
    changed = without_dropout(setup.model)
    try:
        # Compiled blocks round otherwise at each shape, and would be compiled anew for those of this check.
        with without_noise(), uncompiled():
            first, second = _uneven(first_batch(setup), setup)
            apart = _gradients(setup, [first, second])
            together = _together(setup, first, second)
            share = _apart_by(apart, together)
            # LLM.int8 rounds activations by what else is in the batch.
            limit = 0.1 if subject.config.model.quantize == "int8" else _ACCUMULATION_TOLERANCE[setup.precision.name]
            if share > limit and setup.precision.name != "fp32":
                # The sides of a pair nearly cancel in its gradient, and rounding is of the size of what cancels.
                rounding = _apart_by(_together(_rounded_otherwise(setup), first, second), together, _ROUNDING_SCALE)
                limit = max(limit, min(3 * rounding, _MOST_ROUNDING))
    finally:
        restore_dropout(changed)
    if math.isnan(share):
        return failed(
            "the gradient of a micro-batch is not finite", "Look at the weights, and set train.precision=fp32."
        )
    if not share <= limit:
        return failed(
            f"the gradient of two micro-batches is not that of both together: they differ by {share:.1%} of its norm",
            "The loss is not a sum over what it counts: a mean of means weighs targets by their micro-batch.",
            difference=share,
        )
    return passed(
        f"1 × 2 and 2 × 1 micro-batches give one gradient (differing by {share:.1g} of its norm)", difference=share
    )


def _together(setup: Setup, first: Any, second: Any) -> dict[str, torch.Tensor]:
    """The gradient of both as one micro-batch."""
    if can_join(first):
        return _gradients(setup, [joined(first, second)])
    return _gradients_of_sums(setup, [first, second])


def _rounded_otherwise(setup: Setup) -> Setup:
    """The setup with more of its loss."""

    def loss(model: Any, batch: Any) -> Any:
        terms, metrics = setup.loss(model, batch)
        return {name: (_ROUNDING_SCALE * value, count) for name, (value, count) in terms.items()}, metrics

    return replace(setup, loss=loss)


def _apart_by(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], scale: float = 1.0) -> float:
    """Norm of the difference of two gradients, of the first divided by `scale`, over that of the second."""
    norm = math.sqrt(sum(float(each.square().sum()) for each in expected.values()))
    difference = math.sqrt(sum(float((found[name] / scale - expected[name]).square().sum()) for name in expected))
    return difference / norm if norm else float("inf")


def _uneven(batch: Any, setup: Setup) -> tuple[Any, Any]:
    """Two micro-batches with unlike numbers of targets, which a mean of means would weigh wrongly."""
    if isinstance(batch, RolloutBatch):
        return in_two(batch) or _two_of_one_prompt(setup)
    if not isinstance(batch, Batch):
        first, second = map(portion, _next_two(setup))
        return first, with_fewer(second)
    if len(batch.tokens) < 2:
        batch = joined(*(dense_windows(each, rows=1) for each in _next_two(setup)))
    first, second = (_row(batch, index) for index in (0, 1))
    targets = second.targets.clone()
    kept = (targets != NO_TARGET).cumsum(1)
    targets[kept > max(1, int(kept.max()) // 3)] = NO_TARGET
    second = replace(second, targets=targets, n_targets=int((targets != NO_TARGET).sum()))
    return first, second.with_future(len(batch.future))


def _next_two(setup: Setup) -> tuple[Any, Any]:
    position = setup.loader.state()
    pair = setup.loader.next(), setup.loader.next()
    setup.loader.load_state(position)
    return pair


def _two_of_one_prompt(setup: Setup) -> tuple[RolloutBatch, RolloutBatch]:
    first, second = map(portion, _next_two(setup))
    return first, with_a_third(second)


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
        self.gradients = _taken(optimizer)
        return torch.zeros(())

    def step(self, optimizer: Any, lr: float) -> None:
        """No update."""
        optimizer.clear_grads()


def _taken(optimizer: MasterOptimizer) -> dict[str, torch.Tensor]:
    return {name: grad.detach().to(torch.float32, copy=True) for name, grad in optimizer.named_grads().items()}


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
    taken = _taken(setup.optimizer)
    setup.optimizer.clear_grads()
    return taken


def check_learning(subject: Subject) -> Finding:
    """Twenty steps on one batch lower its loss by more than nothing, and it stays lowered; where they do not, eighty."""
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
    is_of_few = subject.config.adapter.name in _OF_FEW
    rounding = _ROUNDING[setup.precision.name]
    share = rounding if is_of_few else max(rounding, _LEAST_FALL[setup.precision.name])
    least, after = share * abs(before), before
    for n_steps in (_STEPS, _MORE_STEPS):
        for _ in range(n_steps):
            train_step(tried, state)
        after = loss_on(setup, batch)
        if not abs(after - before) <= least:
            break
    if state.skipped:
        return failed(f"{state.skipped} of {state.step} steps had a gradient that is no number", "Lower optim.lr.")
    if abs(after - before) <= least and after != before and not is_of_few:
        return failed(
            f"{state.step} steps on one batch change its loss of {before:.4f} by {after - before:.1g}: "
            "at this rate nothing is learnt",
            "Raise optim.lr; for low rates that are meant set preflight.skip=[learning].",
            before=before,
            after=after,
        )
    if abs(after - before) <= least and after != before:
        return skipped(
            f"{state.step} steps on one batch change its loss of {before:.4f} by {after - before:.1g}, which rounding does too",
            before=before,
            after=after,
        )
    if not after < before:
        return failed(
            f"{state.step} steps on one batch take its loss from {before:.6g} to {after:.6g}: it is not lowered",
            "Lower optim.lr; if the loss does not move at all, see what is frozen (adapter).",
            before=before,
            after=after,
        )
    return passed(
        f"{state.step} steps on one batch take its loss from {before:.3f} to {after:.3f}", before=before, after=after
    )
