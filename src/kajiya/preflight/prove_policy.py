"""What is checked of a policy in the place of its loss: who draws is who is trained, and log-probabilities follow the advantage."""

from dataclasses import replace
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, RolloutBatch
from kajiya.preflight.portion import Repeated
from kajiya.preflight.subject import Finding, Subject, failed, passed
from kajiya.training.fit import Setup, train_step
from kajiya.training.rollouts import own_log_probs
from kajiya.training.state import TrainState

_STEPS = 20
_CHUNK_TOKENS = 2048
_MISMATCH = {"fp32": 1e-2, "bf16": 0.3, "bf16-mixed": 0.3, "fp16-mixed": 0.1, "fp8": 0.5}
"""Largest mean difference of log-probabilities, nats. Other weights, or other places of tokens, make it one and more."""

_LEAST_RISE = {"fp32": 1e-4, "bf16": 1e-4, "bf16-mixed": 1e-4, "fp16-mixed": 1e-4, "fp8": 1e-3}
"""Product of advantage and change of log-probability that is neither rounding nor of a rate that teaches nothing, nats."""


def check_policy_start(subject: Subject, batch: RolloutBatch, said: str) -> Finding:
    """The engine drew the answers from the very model that is trained."""
    setup = subject.setup
    own_BT = _log_probs(setup, batch)
    is_target_BT = batch.rows.targets != NO_TARGET
    difference_N = (own_BT - batch.sampled)[is_target_BT].abs()
    mean, largest = float(difference_N.mean()), float(difference_N.max())
    limit = 0.3 if subject.config.model.quantize != "none" else _MISMATCH[setup.precision.name]
    if not mean <= limit:
        return failed(
            f"the engine's log-probabilities of what it drew are {mean:.2g} off the trainer's own on average",
            "This is a fault of the hand-over of weights, not of the config.",
            mean=mean,
        )
    return passed(
        f"the engine drew from the model that is trained: log-probabilities are {mean:.1g} apart, {largest:.1g} at most{said}",
        mean=mean,
        largest=largest,
    )


def check_policy_learning(subject: Subject, batch: RolloutBatch) -> Finding:
    """Twenty steps on one batch of answers make those with a positive advantage likelier than those with a negative one."""
    setup, peak = subject.setup, subject.config.optim.lr
    before_B = _answers(setup, batch)
    setup.model.train()
    loader: Any = Repeated([batch])
    state = TrainState()
    tried = replace(setup, loader=loader, accumulate=1, steps=_STEPS, lr=lambda step: peak * min(1.0, step / 8))
    for _ in range(_STEPS):
        train_step(tried, state)
    moved = float((batch.advantages * (_answers(setup, batch) - before_B)).mean())
    if state.skipped:
        return failed(f"{state.skipped} of {_STEPS} steps had a gradient that is no number", "Lower optim.lr.")
    if not moved > _LEAST_RISE[setup.precision.name]:
        return failed(
            f"{_STEPS} steps on one batch of answers do not make the better ones likelier than the others: the mean product of "
            f"advantage and log-probability rises by {moved:.1g} nats",
            f"{'Raise' if moved >= 0 else 'Lower'} optim.lr; if nothing moves at all, see what is frozen (adapter).",
        )
    return passed(
        f"{_STEPS} steps move log-probabilities with the advantage: their mean product rises by {moved:.3g} nats",
        moved=moved,
    )


def _answers(setup: Setup, batch: RolloutBatch) -> torch.Tensor:
    """Mean log-probability of each answer's tokens, nats [S]."""
    is_target_BT = batch.rows.targets != NO_TARGET
    return (_log_probs(setup, batch) * is_target_BT).sum(dim=1) / is_target_BT.sum(dim=1)


def _log_probs(setup: Setup, batch: RolloutBatch) -> torch.Tensor:
    device = setup.strategy.device
    return own_log_probs(setup.model, lambda: setup.precision.context(device), device, _CHUNK_TOKENS)(batch.rows).cpu()
