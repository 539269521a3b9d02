"""The one loop. It knows no model, no data set, no device, no method: only batches, a loss, a strategy and hooks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from kajiya.errors import TrainingError
from kajiya.training.losses import Loss, Terms
from kajiya.training.masters import MasterOptimizer
from kajiya.training.precision import Precision
from kajiya.training.state import TrainState
from kajiya.training.strategy import Strategy


class Loader(Protocol):
    """Batches in a fixed order, with a position of a few integers."""

    def next(self) -> Any:
        """The next micro-batch; the data begin again at their end."""
        ...

    def state(self) -> dict[str, int]:
        """The position, to go on from it."""
        ...

    def load_state(self, state: dict[str, int]) -> None:
        """Go to a position."""
        ...


@dataclass(frozen=True)
class Setup:
    """Everything that a step needs; nothing in it changes while the loop runs but the tensors."""

    model: nn.Module
    loss: Loss
    loader: Loader
    optimizer: MasterOptimizer
    strategy: Strategy
    precision: Precision
    lr: Callable[[int], float]
    steps: int
    accumulate: int
    clip_norm: float | None
    max_skipped: int
    row_growth: tuple[float, ...] = ()


@dataclass(frozen=True)
class Hook:
    """What happens once in a while: after every `every` steps, and at the end when `at_end`."""

    name: str
    every: int
    call: Callable[["StepReport"], None]
    at_end: bool = True


@dataclass(frozen=True)
class StepReport:
    """What a hook sees after a step."""

    setup: Setup
    state: TrainState
    lr: float
    grad_norm: float | None


def fit(setup: Setup, state: TrainState, hooks: Sequence[Hook], should_stop: Callable[[], bool]) -> None:
    """Train until `setup.steps`, or until `should_stop()` after a whole step; `state` is brought forward in place."""
    while state.step < setup.steps and not should_stop():
        began = time.perf_counter()
        norm = train_step(setup, state)
        state.seconds += time.perf_counter() - began
        report: StepReport | None = None
        for hook in hooks:
            is_last = state.step == setup.steps and hook.at_end
            if state.step % hook.every == 0 or is_last:
                report = report or StepReport(setup, state, setup.lr(state.step), float(norm))
                hook.call(report)


def train_step(setup: Setup, state: TrainState) -> torch.Tensor:
    """One optimizer step over a group of micro-batches; returns the norm of the gradient before clipping."""
    strategy = setup.strategy
    if not setup.model.training:
        raise TrainingError(
            f"step {state.step + 1}: the model is in evaluation mode, so it would train without dropout"
        )
    group = [setup.loader.next() for _ in range(setup.accumulate)]
    # One denominator for the whole group and all ranks: a mean of means would weigh tokens by their micro-batch.
    units: dict[str, float] = {unit: sum(batch.counts[unit] for batch in group) for unit in group[0].counts}
    totals = strategy.sum_counts(units)
    if totals["targets"] == 0:
        raise TrainingError(f"step {state.step + 1}: the group of micro-batches has no target to learn from")
    pieces = pieces_at(setup.row_growth, state.step / setup.steps)
    gathered: list[Terms] = []
    for host_batch in group:
        batch = (host_batch.cut(pieces) if pieces > 1 else host_batch).to(strategy.device)
        with setup.precision.context(strategy.device):
            terms, metrics = setup.loss(setup.model, batch)
        parts = [value / totals[_unit(name, count, batch.counts)] for name, (value, count) in terms.items()]
        strategy.backward(torch.stack(parts).sum())
        state.tokens += batch.tokens.numel()
        kept = metrics or terms
        gathered.append({f"train/{name}": (total.detach(), count) for name, (total, count) in kept.items()})
    state.targets += int(totals["targets"])
    norm = strategy.clip(setup.optimizer, setup.clip_norm)
    state.step += 1
    if torch.isfinite(norm):
        strategy.step(setup.optimizer, setup.lr(state.step))
        for metrics in gathered:
            _gather(state, metrics)
    else:
        setup.optimizer.clear_grads()
        state.skipped += 1
        if state.skipped > setup.max_skipped:
            raise TrainingError(
                f"step {state.step}: the gradient is not finite, for the {state.skipped}th time.\n"
                "Lower optim.lr, lengthen schedule.warmup_fraction, or set train.precision=fp32; "
                "optim.max_skipped says how many such steps are skipped."
            )
    return norm


def _unit(term: str, count: int, counts: Mapping[str, float]) -> str:
    """What a term is a sum over: the count that the batch declares under the term's own name, else its targets."""
    unit = term if term in counts else "targets"
    if count != counts[unit]:
        raise TrainingError(
            f"the loss says that its term {term!r} is a sum over {count}, but the batch has {counts[unit]} {unit}.\n"
            "A term that counts something else needs a batch whose `counts` declare it under the term's name."
        )
    return unit


def pieces_at(row_growth: Sequence[float], progress: float) -> int:
    """Into how many pieces each row is cut at this share of the steps: halved at every share of `row_growth`."""
    return int(2 ** sum(progress < share for share in row_growth))


def _gather(state: TrainState, metrics: dict[str, tuple[torch.Tensor, int]]) -> None:
    for name, (total, count) in metrics.items():
        sums = state.window.setdefault(name, [0.0, 0.0])
        sums[0] += float(total)
        sums[1] += count


def drain_window(state: TrainState) -> dict[str, float]:
    """Means of the metrics gathered since the last call, which begin anew."""
    means = {name: total / count for name, (total, count) in state.window.items() if count}
    state.window = {}
    return means
