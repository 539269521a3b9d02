"""A few real steps, measured and then undone: what a step costs in time and memory on this machine."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from kajiya.run.usage import peak_memory
from kajiya.training.fit import Setup, train_step
from kajiya.training.generators import undisturbed
from kajiya.training.state import TrainState

_LEAST_STEPS = 3


@dataclass(frozen=True)
class StepCost:
    """What was measured."""

    step_seconds: float
    """Median time of one optimizer step, seconds; where rows grow, the mean over the run of the medians of each length."""
    warmup_seconds: float
    """Time of the first steps, compilation included, seconds."""
    measured_seconds: float
    """Time of the steps behind the median, seconds."""
    peak_bytes: int
    """Highest memory of the process (CPU) or of the device (GPU) so far, bytes."""
    optimizer_bytes: int
    """Masters and optimizer slots, which a checkpoint holds, bytes."""
    measured_steps: int
    """Steps behind the median."""


@contextmanager
def undone(setup: Setup, *, has_steps: bool = True) -> Iterator[None]:
    """Steps within leave no trace: weights, optimizer, random generators, strategy and loader are as they were, bit for bit.

    Without `has_steps` the block changes no weights, and no copy of them is kept.
    """
    before = {name: tensor.clone() for name, tensor in setup.optimizer.state_tensors().items()} if has_steps else {}
    modes = [(module, module.training) for module in setup.model.modules()]
    buffers = {name: tensor.clone() for name, tensor in setup.model.named_buffers()}
    position, remembered = setup.loader.state(), setup.strategy.state()
    with undisturbed():
        try:
            yield
        finally:
            setup.optimizer.clear_grads()
            if has_steps:
                setup.optimizer.reset(before)
            for module, is_training in modes:
                module.training = is_training
            with torch.no_grad():
                for name, buffer in setup.model.named_buffers():
                    buffer.copy_(buffers[name])
            setup.loader.load_state(position)
            setup.strategy.load_state(remembered)
            if setup.guard.shrink is not None:
                setup.guard.shrink(0)


def measure_steps(setup: Setup, enough_s: float = 2.0, heaviest: Any = None) -> StepCost:
    """Run steps at full cost, at least three and `enough_s` seconds; weights, optimizer, random generators and loader are left
    bit-identical. The peak is that of a step on the micro-batch `heaviest`, too, where it is given."""
    scratch = TrainState()
    shares = _shares(setup.row_growth)
    step_seconds, warm, spent, n_steps = 0.0, 0.0, 0.0, 0
    with undone(setup):
        for share, growth in shares:
            phase = replace(setup, row_growth=growth)
            warm += _timed_step(phase, scratch)
            times: list[float] = []
            while len(times) < _LEAST_STEPS or sum(times) < enough_s / len(shares):
                times.append(_timed_step(phase, scratch))
            step_seconds += share * median(times)
            spent += sum(times)
            n_steps += len(times)
        if heaviest is not None:
            _timed_step(replace(setup, loader=_Only(heaviest), row_growth=()), scratch)
        slots = setup.optimizer.state_tensors().values()
        optimizer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in slots)
    return StepCost(step_seconds, warm, spent, peak_bytes(setup.strategy.device), optimizer_bytes, n_steps)


class _Only:
    """A loader of one batch, again and again."""

    waited_s = 0.0

    def __init__(self, batch: Any) -> None:
        self.next = self.heaviest = lambda: batch

    def state(self) -> dict[str, int]:
        """It has no position."""
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        """It has no position."""


def _shares(row_growth: tuple[float, ...]) -> list[tuple[float, tuple[float, ...]]]:
    """Share of the run at each length of row, longest first, with a growth that holds that length from the start."""
    edges = (0.0, *row_growth, 1.0)
    n = len(row_growth)
    # A share that is never reached keeps the rows cut.
    return [(edges[n - cuts + 1] - edges[n - cuts], (math.inf,) * cuts) for cuts in range(n + 1)]


def peak_bytes(device: torch.device) -> int:
    """Highest resident memory of this process, or highest allocation on a GPU, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _timed_step(setup: Setup, state: TrainState) -> float:
    """Seconds of one step; the first rank's, so that all ranks measure the same number of steps."""
    started = time.perf_counter()
    # The schedule is not known yet (its length may be derived from this very measurement), and a rate of almost
    # nothing keeps the weights sane without changing what a step costs.
    # A step that is not finite is for the proof and the run to judge, which tell it and keep its batches.
    trial = replace(setup, lr=lambda _step: 1e-9, watches=(), max_skipped=sys.maxsize)
    train_step(trial, state)
    return setup.strategy.from_first(time.perf_counter() - started)
