"""The one loop. It knows no model, no data set, no device, no method: only batches, a loss, a strategy and hooks."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from kajiya.errors import TrainingError
from kajiya.training.guard import Guard, find_spike, handle_nonfinite, handle_spike
from kajiya.training.losses import Loss, Measure
from kajiya.training.masters import MasterOptimizer
from kajiya.training.precision import Precision
from kajiya.training.state import TrainState
from kajiya.training.strategy import Strategy
from kajiya.training.terms import Sums, gather, numbered, total_of, unit_of_term
from kajiya.training.timing import Stopwatch, add_times

T = TypeVar("T")


class Loader(Protocol):
    """Batches in a fixed order, with a position of a few integers."""

    @property
    def waited_s(self) -> float:
        """Time that steps have waited for rows that were not ready, seconds."""
        ...

    def next(self) -> Any:
        """The next micro-batch; the data begin again at their end."""
        ...

    def heaviest(self) -> Any:
        """The micro-batch that takes the most memory; the position stays."""
        ...

    def state(self) -> dict[str, Any]:
        """The position, to go on from it, as JSON can hold it."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
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
    guard: Guard = field(default_factory=Guard)
    watches: tuple["Watch", ...] = ()


@dataclass(frozen=True)
class Watch:
    """Something that looks at the clipped gradients before the update of every `every`-th step."""

    every: int
    look: Callable[["Setup", TrainState], None]


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
    """Train until `setup.steps`, or until `should_stop()` after a whole step on any rank; `state` goes forward in place."""
    strategy = setup.strategy
    strategy.load_state(state.strategy)
    watch = Stopwatch(strategy.device)
    while state.step < setup.steps and not strategy.any(should_stop()):
        began = time.perf_counter()
        norm = take_step(setup, state, watch)
        state.seconds += time.perf_counter() - began
        state.strategy = strategy.state()
        report: StepReport | None = None
        for hook in hooks:
            is_last = state.step == setup.steps and hook.at_end
            if state.step % hook.every == 0 or is_last:
                report = report or StepReport(setup, state, setup.optimizer.applied_rate(setup.lr(state.step)), norm)
                began = time.perf_counter()
                hook.call(report)
                add_times(state.spent, {hook.name: time.perf_counter() - began})
    add_times(state.spent, watch.finish())


def train_step(setup: Setup, state: TrainState) -> float:
    """One optimizer step by itself, after which the device is waited for; else as `take_step`."""
    watch = Stopwatch(setup.strategy.device)
    norm = take_step(setup, state, watch)
    add_times(state.spent, watch.finish())
    return norm


def take_step(setup: Setup, state: TrainState, watch: Stopwatch) -> float:
    """One optimizer step over a group of micro-batches; returns the norm of the gradient before clipping.

    On a GPU the time of its update is read with the next step's, so that the device need not be waited for twice.
    """
    if not setup.model.training:
        raise TrainingError(
            f"step {state.step + 1}: the model is in evaluation mode, so it would train without dropout"
        )
    strategy = setup.strategy
    watch.begin()
    position = setup.loader.state()
    while True:
        group = [setup.loader.next() for _ in range(setup.accumulate * pieces_of_micro_batch(setup, state))]
        watch.lap("data")
        try:
            totals, sums = _gradients(setup, state, group, watch)
            break
        except torch.OutOfMemoryError as problem:
            _halve(setup, state, position, problem)
    norm = strategy.clip(setup.optimizer, setup.clip_norm)
    # The one time that the step waits for the device.
    stacked = strategy.sum(sums.stacked())
    values = torch.cat([norm.reshape(1).to(stacked), stacked]).tolist()
    state.step += 1
    state.tokens += int(totals["tokens"])
    state.targets += int(totals["targets"])
    _update(setup, state, group, sums.names, values)
    watch.lap("optimizer")
    add_times(state.spent, watch.read())
    return float(values[0])


def _gradients(setup: Setup, state: TrainState, group: list[Any], watch: Stopwatch) -> tuple[dict[str, float], Sums]:
    """Go forward and backward through the group; its counts over all ranks, and its sums: `objective` and the metrics."""
    strategy = setup.strategy
    # One denominator for the whole group and all ranks: a mean of means would weigh tokens by their micro-batch.
    units = {unit: sum(batch.counts[unit] for batch in group) for unit in group[0].counts}
    totals = _over_ranks(strategy, units | {"tokens": sum(batch.n_tokens for batch in group)})
    if not any(totals[unit] for unit in units):
        raise TrainingError(f"step {state.step + 1}: the group of micro-batches has no target to learn from")
    group = _measured(setup, group, totals)
    sums = _on_all(strategy, lambda: _passes(setup, state, group, totals, watch))
    strategy.exchange(setup.optimizer)
    watch.lap("backward")
    return totals, sums


def _passes(setup: Setup, state: TrainState, group: list[Any], totals: Mapping[str, float], watch: Stopwatch) -> Sums:
    """This rank's part of `_gradients`, which waits for no other."""
    strategy = setup.strategy
    pieces = pieces_at(setup.row_growth, state.step / setup.steps)
    sums = Sums()
    for host_batch in group:
        batch, counts = (host_batch.cut(pieces) if pieces > 1 else host_batch).to(strategy.device), host_batch.counts
        watch.lap("data")
        terms, metrics = strategy.forward(setup.model, setup.loss, batch)
        parts = [value / total_of(name, count, counts, totals, state.step) for name, (value, count) in terms.items()]
        objective = torch.stack(parts).sum()
        watch.lap("forward")
        strategy.backward(objective)
        strategy.add_up(setup.optimizer, len(group))
        watch.lap("backward")
        sums.add({"objective": (objective.detach(), 0.0)} | numbered(metrics or terms, counts))
    return sums


def _on_all(strategy: Strategy, work: Callable[[], T]) -> T:
    """What `work` gives on this rank. Where memory runs out on any rank, an `OutOfMemoryError` on all, behind the work of all."""
    done: list[T] = []
    said = "another process of the run has run out of memory"
    try:
        done.append(work())
    except torch.OutOfMemoryError as problem:
        said = str(problem)  # the error itself would keep what its frames hold
    if strategy.any(not done):
        raise torch.OutOfMemoryError(said)
    return done[0]


def _update(setup: Setup, state: TrainState, group: list[Any], names: list[str], values: list[float]) -> None:
    """Take the step, unless its loss or gradient is not finite or its loss a spike. `values`: norm, then `Sums.stacked`."""
    strategy, guard = setup.strategy, setup.guard
    norm, objective = values[0], values[1]
    if not (math.isfinite(norm) and math.isfinite(objective)):
        # A loss that is not finite was so before it was scaled: only a gradient can be the scale's fault.
        if not math.isfinite(objective):
            setup.optimizer.clear_grads()
            handle_nonfinite(guard, state, group, "loss", setup.max_skipped)
        elif strategy.refuse(setup.optimizer):
            state.overflows += 1
        else:
            handle_nonfinite(guard, state, group, "gradient", setup.max_skipped)
        return
    if find_spike(guard, state, objective) and handle_spike(guard, state, objective, group, setup.max_skipped):
        setup.optimizer.clear_grads()
        return
    for watch in setup.watches:
        if state.step % watch.every == 0:
            watch.look(setup, state)
    try:
        strategy.step(setup.optimizer, setup.lr(state.step))
    except torch.OutOfMemoryError as problem:
        raise TrainingError(
            f"step {state.step}: out of memory in the update of the weights, where smaller micro-batches are no help: "
            f"{str(problem).splitlines()[0]}\nSet optim.offload=true, optim=adamw_8bit or adapter=lora."
        ) from problem
    gather(state, names[1:], [*values[2 : 1 + len(names)], *values[2 + len(names) :]])


def _halve(setup: Setup, state: TrainState, position: dict[str, Any], problem: torch.OutOfMemoryError) -> None:
    """Memory ran out: forget the group and have it come again in more micro-batches of fewer rows."""
    guard = setup.guard
    setup.optimizer.clear_grads()
    setup.loader.load_state(position)
    if guard.shrink is None or not guard.shrink(state.halvings + 1):
        if setup.strategy.device.type == "cuda":
            torch.cuda.empty_cache()
        raise TrainingError(
            f"step {state.step + 1}: out of memory, and the micro-batch cannot be made smaller: {str(problem).splitlines()[0]}\n"
            "Set train.gradient_checkpointing=full, or shorten data.row_tokens."
        ) from problem
    state.halvings += 1
    if setup.strategy.device.type == "cuda":
        torch.cuda.empty_cache()
    times = pieces_of_micro_batch(setup, state)
    guard.tell(
        f"step {state.step + 1}: out of memory; micro-batches are {times} times smaller from here on, "
        f"{setup.accumulate * times} in a step, so that a step keeps its rows"
    )


def pieces_of_micro_batch(setup: Setup, state: TrainState) -> int:
    """How many micro-batches the loader gives in place of one of the config's, since memory ran out so often."""
    return 1 if setup.guard.shrink is None else setup.guard.shrink(state.halvings)


def _measured(setup: Setup, group: list[Any], totals: Mapping[str, float]) -> list[Any]:
    """The group, each batch with the means over all of it (and all ranks) that the loss asked for."""
    if setup.measure is None:
        return group
    strategy, measure = setup.strategy, setup.measure
    sums = Sums()
    units: dict[str, str] = {}

    def look() -> None:
        for batch in group:
            with setup.precision.context(strategy.device):
                terms = measure(setup.model, batch.to(strategy.device))
            sums.add({name: (total.detach(), 0.0) for name, (total, _) in terms.items()})
            units.update({name: unit_of_term(name, count, batch.counts) for name, (_, count) in terms.items()})

    _on_all(strategy, look)
    # They stay on the device, which is not waited for.
    added = strategy.sum(sums.stacked())
    means = {name: added[place] / totals[units[name]] for place, name in enumerate(sums.names)}
    return [replace(batch, measured=means) for batch in group]


def _over_ranks(strategy: Strategy, sums: Mapping[str, float]) -> dict[str, float]:
    values = strategy.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    return dict(zip(sums, values, strict=True))


def pieces_at(row_growth: Sequence[float], progress: float) -> int:
    """Into how many pieces each row is cut at this share of the steps: halved at every share of `row_growth`."""
    return int(2 ** sum(progress < share for share in row_growth))
