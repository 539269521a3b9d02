"""The learning-rate range test (Smith, arXiv:1506.01186, section 3.3): a rate that rises step by step until the loss bursts."""

import math
from dataclasses import dataclass, replace
from typing import Any

from kajiya.errors import TrainingError
from kajiya.training.fit import Setup, train_step
from kajiya.training.guard import Guard
from kajiya.training.probe import undone
from kajiya.training.state import TrainState
from kajiya.training.terms import drain_window

_SMOOTHING = 0.8
"""Decay of the running mean of the loss."""
_BURST = 2.0
"""Times the smallest smoothed loss at which the test ends."""
_LEAST_POINTS = 10


@dataclass(frozen=True)
class RangeTest:
    """What the test saw; the rates are peak rates, as `optim.lr` is."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    """Rate at which the smoothed loss fell fastest per factor of the rate."""


def range_test(setup: Setup, lowest: float, highest: float, steps: int) -> RangeTest:
    """At most `steps` steps at rates from `lowest` to `highest`, a factor apart; all of it is undone afterwards, bit for bit.

    Raises `TrainingError` where the loss bursts before there is anything to see.
    """
    state = TrainState()
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []

    def rate(step: int) -> float:
        return float(lowest * (highest / lowest) ** ((step - 1) / (steps - 1)))

    # Rows stay as the run begins with them: a loss that falls because they grow says nothing of the rate.
    short = tuple(math.inf for _ in setup.row_growth)
    trial = replace(setup, lr=rate, steps=steps, guard=Guard(), max_skipped=steps, watches=(), row_growth=short)
    with undone(setup):
        for _ in range(steps):
            overflows = state.overflows
            train_step(trial, state)
            if state.overflows > overflows:  # fp16's loss scale has come down, which says nothing of the rate
                continue
            values: dict[str, Any] = drain_window(state)
            if not values:  # the step was skipped: its gradient was not finite
                break
            loss = next(iter(values.values()))
            mean = loss if not smoothed else _SMOOTHING * smoothed[-1] + (1 - _SMOOTHING) * loss
            if len(smoothed) >= _LEAST_POINTS and not mean < _BURST * min(smoothed):
                break
            rates.append(rate(state.step))
            losses.append(loss)
            smoothed.append(mean)
    if len(rates) < _LEAST_POINTS:
        raise TrainingError(
            f"the loss burst after {len(rates)} steps, at a rate of {rates[-1] if rates else lowest:.3g}: lower the lowest rate"
        )
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), _steepest(rates, smoothed))


def _steepest(rates: list[float], smoothed: list[float]) -> float:
    """Where the smoothed loss falls fastest per factor of the rate, before its lowest point."""
    end = max(2, smoothed.index(min(smoothed)) + 1)
    slopes = [
        (smoothed[i + 1] - smoothed[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(1, min(end, len(rates) - 1))
    ]
    return rates[1 + slopes.index(min(slopes))]
