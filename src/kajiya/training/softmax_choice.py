"""What makes the loss's softmax on a GPU: the way that was faster when both were timed on it, at the run's own shape."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

TRITON, TORCH = "triton", "torch"
_ROUNDS = 5
_WORTH = 1.05
"""The kernel must be this much faster: less is within the noise of a few rounds."""


@dataclass(frozen=True)
class Choice:
    """A way, and the reason in words."""

    way: str
    words: str


@functools.cache
def triton_problem() -> str | None:
    """Why the Triton kernel of the softmax cannot be had, in words; `None` when it can. On a GPU it is run once, on one token."""
    try:
        from kajiya.training.entropy_kernel import entropy
    except ImportError as error:
        return f"{error} (pip install triton)"
    if torch.cuda.is_available():
        try:
            target, weight = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.ones(1, device="cuda")
            entropy(torch.zeros(1, 2, device="cuda"), target, weight, 0.0, 0.0, False)
        except Exception as error:  # no C compiler, no headers of Python, a GPU that is too old: each raises its own
            return f"the kernel cannot be compiled: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return None


def begun_with(way: str) -> Choice:
    """The way that the run, or its first process, has taken; torch's operators where Triton's kernel cannot be had here."""
    problem = triton_problem() if way == TRITON else None
    return Choice(way, f"{way}, as the run began") if problem is None else Choice(TORCH, f"torch: {problem}")


def choose(calls: Mapping[str, Callable[[], object]], problem: str | None) -> Choice:
    """Triton's kernel where it is faster than torch's operators by more than noise, else these; `problem`: why it cannot be had.

    `calls` makes one chunk's softmax in each way. Both are timed in turns, and the best round of each counts.
    """
    if problem is not None:
        return Choice(TORCH, f"torch: {problem}")
    try:
        for call in calls.values():
            call()  # the first one compiles
        rounds = [{way: elapsed_ms(call) for way, call in calls.items()} for _ in range(_ROUNDS)]
    except torch.OutOfMemoryError:
        return Choice(TORCH, "torch: there was no memory to time Triton's kernel beside it")
    ours, theirs = (min(each[way] for each in rounds) for way in (TRITON, TORCH))
    figures = f"{ours:.2f} ms a chunk by Triton, {theirs:.2f} by torch"
    return Choice(TRITON, f"Triton: {figures}") if theirs >= _WORTH * ours else Choice(TORCH, f"torch: {figures}")


def elapsed_ms(call: Callable[[], object]) -> float:
    """Time of a call on the current GPU, which is waited for."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
