"""How much memory a micro-batch takes, measured, and the largest that fits."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kajiya.errors import TrainingError
from kajiya.run.usage import recent_peak, restart_peak
from kajiya.training.fit import Loader, Setup, train_step
from kajiya.training.guard import Guard
from kajiya.training.probe import undone
from kajiya.training.state import TrainState

_SHARE = 0.8
"""Share of the free memory that is given out: other programs, evaluation and the writing of checkpoints need some."""
_UNSEEN_BYTES = 16 * 2**20
"""Growth that drowns in what else a step takes and gives back: no measured one counts as less."""


def largest_micro_batch(setup: Setup, resize: Callable[[int], None], own_rows: int) -> int:
    """The largest divisor of a rank's `own_rows` of a step that fits into memory, by whole steps on the longest rows, undone.

    On a GPU sizes are tried from the largest down. On a CPU, where too much kills the process, steps of one row and of a few
    tell what a row takes. `resize(n)` makes the loader give n rows at a time, the same on all ranks.
    """
    sizes = [n for n in range(1, own_rows + 1) if own_rows % n == 0]
    trial = replace(
        setup,
        loader=_Heaviest(setup.loader),
        accumulate=1,
        lr=lambda _step: 1e-9,
        guard=Guard(),
        max_skipped=sys.maxsize,
        watches=(),
        row_growth=(),
    )
    with undone(setup):
        fits = _largest_on_gpu if setup.strategy.device.type == "cuda" else _largest_on_cpu
        found = sizes.index(fits(trial, resize, sizes))
    # The smallest that any rank found.
    votes = setup.strategy.sum(torch.nn.functional.one_hot(torch.tensor(found), len(sizes)).double())
    return sizes[int(votes.nonzero()[0])]


class _Heaviest:
    """The loader's heaviest micro-batch, again and again."""

    waited_s = 0.0

    def __init__(self, loader: Loader) -> None:
        self.heaviest = loader.heaviest
        self.next = loader.heaviest
        self.state = loader.state
        self.load_state = loader.load_state


def _largest_on_gpu(trial: Setup, resize: Callable[[int], None], sizes: list[int]) -> int:
    for rows in reversed(sizes):
        resize(rows)
        has_room = _has_room(trial)
        # A size is too large for all where it is too large for one: they go on to the next together.
        if not trial.strategy.any(not has_room):
            return rows
        if trial.strategy.device.type == "cuda":
            torch.cuda.empty_cache()
    raise TrainingError("not even one row fits into the GPU's memory: set train.gradient_checkpointing=full")


def _has_room(trial: Setup) -> bool:
    try:
        train_step(trial, TrainState())
    except TrainingError as problem:
        if not isinstance(problem.__cause__, torch.OutOfMemoryError):
            raise
        trial.optimizer.clear_grads()
        for optimizer in trial.optimizer.optimizers:
            optimizer.state.clear()  # half of a parameter's slots may be there
        return False
    return True


def _largest_on_cpu(trial: Setup, resize: Callable[[int], None], sizes: list[int]) -> int:
    few = next((n for n in sizes if n >= 4), sizes[-1])
    peaks = {}
    # The first step takes what every later one finds.
    for rows in (few, 1, few):
        resize(rows)
        if not restart_peak():
            return few
        train_step(trial, TrainState())
        peaks[rows] = recent_peak()
    grown = max(_UNSEEN_BYTES, peaks[few] - peaks[1])
    return rows_that_fit(sizes, grown / max(1, few - 1), free_bytes(), few)


def rows_that_fit(sizes: list[int], row_bytes: float, free: int | None, measured: int) -> int:
    """The largest of `sizes` whose rows beyond the `measured` ones, which fit, take no more than the share of what is free."""
    if free is None:
        return measured
    return max(n for n in sizes if n <= measured or (n - measured) * row_bytes <= _SHARE * free)


def free_bytes() -> int | None:
    """Memory that this process can still have, in bytes: the machine's, or its container's if that is less; `None`: unknown."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = [line.split() for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        found += [1024 * int(words[1]) for words in lines]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)
