"""How the values of each tensor's gradient and weights are distributed, for those who want to see them in a tracker."""

from collections.abc import Callable, Sequence

import torch

from kajiya.training.fit import Setup, Watch
from kajiya.training.state import TrainState

_BINS = 32


def histograms_watch(every: int | None, hear: Callable[..., object]) -> Watch | None:
    """Tells a histogram of `gradient/<name>` (after clipping) and `weight/<name>` at every `every`-th step."""
    if every is None:
        return None

    def look(setup: Setup, state: TrainState) -> None:
        parameters = setup.optimizer.parameters
        named = [(name, parameters[name].detach(), grad) for name, grad in setup.optimizer.named_grads().items()]
        names = [f"{kind}/{name}" for kind in ("gradient", "weight") for name, _, _ in named]
        counted = count_values([*(grad for _, _, grad in named), *(weight for _, weight, _ in named)])
        values = {
            name: {"low": low, "high": high, "counts": counts}
            for name, (low, high, counts) in zip(names, counted, strict=True)
        }
        hear("histograms", step=state.step, values=values)

    return Watch(every, look)


def count_values(tensors: Sequence[torch.Tensor]) -> list[tuple[float, float, list[int]]]:
    """Of each tensor its lowest and highest value, and how many lie in each of the equal bins between them.

    A tensor that is one value throughout has them all in the bin in the middle of a range of width 1. The device is waited
    for twice.
    """
    ends = torch.stack([torch.stack(torch.aminmax(each)).float() for each in tensors]).tolist()
    ranges = [(low, high) if high > low else (low - 0.5, high + 0.5) for low, high in ends]
    counts = [
        torch.histc(each.float(), _BINS, min=low, max=high) for each, (low, high) in zip(tensors, ranges, strict=True)
    ]
    read = torch.stack(counts).long().tolist()
    return [(low, high, row) for (low, high), row in zip(ranges, read, strict=True)]
