"""The one loop. It knows no model, no data set, no device, no method: only batches, a loss, a strategy and hooks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from kajiya.errors import TrainingError
from kajiya.training.losses import Loss, Measure, Terms
from kajiya.training.masters import MasterOptimizer
from kajiya.training.precision import Precision
from kajiya.training.state import TrainState
from kajiya.training.strategy import Strategy


class Loader(Protocol):
    """Batches in a fixed order, with a position of a few integers."""

    @property
    def waited_s(self) -> float:
        """Time that steps have waited for rows that were not ready, seconds."""
        ...

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
    measure: Measure | None = None


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
    if not any(totals.values()):
        raise TrainingError(f"step {state.step + 1}: the group of micro-batches has no target to learn from")
    group = _measured(setup, group, totals)
    pieces = pieces_at(setup.row_growth, state.step / setup.steps)
    gathered: list[dict[str, tuple[torch.Tensor, float]]] = []
    for host_batch in group:
        batch = (host_batch.cut(pieces) if pieces > 1 else host_batch).to(strategy.device)
        with setup.precision.context(strategy.device):
            terms, metrics = setup.loss(setup.model, batch)
        parts = [
            value / _total(name, count, batch.counts, totals, state.step) for name, (value, count) in terms.items()
        ]
        strategy.backward(torch.stack(parts).sum())
        state.tokens += batch.n_tokens
        gathered.append({f"train/{name}": sums for name, sums in numbered(metrics or terms, batch.counts).items()})
    state.targets += int(totals["targets"])
    norm = strategy.clip(setup.optimizer, setup.clip_norm)
    state.step += 1
    if torch.isfinite(norm):
        strategy.step(setup.optimizer, setup.lr(state.step))
        for sums in gathered:
            _gather(state, sums)
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


def _measured(setup: Setup, group: list[Any], totals: Mapping[str, float]) -> list[Any]:
    """The group, each batch with the means over all of it (and all ranks) that the loss asked for."""
    if setup.measure is None:
        return group
    strategy = setup.strategy
    sums: dict[str, float] = {}
    units: dict[str, str] = {}
    for batch in group:
        with setup.precision.context(strategy.device):
            terms = setup.measure(setup.model, batch.to(strategy.device))
        for name, (total, count) in terms.items():
            sums[name] = sums.get(name, 0.0) + float(total)
            units[name] = _unit(name, count, batch.counts)
    sums = strategy.sum_counts(sums)
    means = {name: total / totals[units[name]] for name, total in sums.items()}
    return [replace(batch, measured=means) for batch in group]


def _total(term: str, count: float | str, counts: Mapping[str, float], totals: Mapping[str, float], step: int) -> float:
    """What a term is divided by: the group's count of its unit, over all ranks."""
    unit = _unit(term, count, counts)
    if totals[unit] == 0:
        raise TrainingError(f"step {step + 1}: the group of micro-batches has no {unit} to learn {term!r} from")
    return totals[unit]


def _unit(term: str, count: float | str, counts: Mapping[str, float]) -> str:
    """The unit that the loss names, or, for a number, the one that the batch counts under the term's name, else its targets."""
    if isinstance(count, str):
        if count not in counts:
            raise TrainingError(
                f"the loss says that its term {term!r} is a sum over {count}, and the batch counts {', '.join(counts)}"
            )
        return count
    unit = term if term in counts else "targets"
    if count != counts[unit]:
        raise TrainingError(
            f"the loss says that its term {term!r} is a sum over {count}, but the batch has {counts[unit]} {unit}.\n"
            "A term that counts something else names its unit, one of those in the batch's `counts`."
        )
    return unit


def numbered(terms: Terms, counts: Mapping[str, float]) -> dict[str, tuple[torch.Tensor, float]]:
    """The sums without gradient, each with its count as a number."""
    return {
        name: (total.detach(), counts[_unit(name, count, counts)] if isinstance(count, str) else count)
        for name, (total, count) in terms.items()
    }


def pieces_at(row_growth: Sequence[float], progress: float) -> int:
    """Into how many pieces each row is cut at this share of the steps: halved at every share of `row_growth`."""
    return int(2 ** sum(progress < share for share in row_growth))


def _gather(state: TrainState, metrics: Mapping[str, tuple[torch.Tensor, float]]) -> None:
    for name, (total, count) in metrics.items():
        sums = state.window.setdefault(name, [0.0, 0.0])
        sums[0] += float(total)
        sums[1] += count


def drain_window(state: TrainState) -> dict[str, float]:
    """Means of the metrics gathered since the last call, which begin anew."""
    means = {name: total / count for name, (total, count) in state.window.items() if count}
    state.window = {}
    return means
