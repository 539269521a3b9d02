"""What the sums of a loss are sums over: the units that a batch counts, and the means that are logged."""

from collections.abc import Mapping

import torch

from kajiya.errors import TrainingError
from kajiya.training.losses import Terms
from kajiya.training.state import TrainState


def total_of(
    term: str, count: float | str | torch.Tensor, counts: Mapping[str, float], totals: Mapping[str, float], step: int
) -> float:
    """What a term is divided by: the group's count of its unit, over all ranks."""
    unit = unit_of_term(term, count, counts)
    if totals[unit] == 0:
        raise TrainingError(f"step {step + 1}: the group of micro-batches has no {unit} to learn {term!r} from")
    return totals[unit]


def unit_of_term(term: str, count: float | str | torch.Tensor, counts: Mapping[str, float]) -> str:
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


def numbered(terms: Terms, counts: Mapping[str, float]) -> dict[str, tuple[torch.Tensor, float | torch.Tensor]]:
    """The sums without gradient, each with its count as a number, which may still be on the device."""
    return {
        name: (total.detach(), counts[unit_of_term(name, count, counts)] if isinstance(count, str) else count)
        for name, (total, count) in terms.items()
    }


class Sums:
    """Sums of a step's metrics over its micro-batches, on the device: nothing waits for them until the step is done."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}
        self._counts: dict[str, float | torch.Tensor] = {}

    def add(self, terms: Mapping[str, tuple[torch.Tensor, float | torch.Tensor]]) -> None:
        """One micro-batch's sums and counts."""
        for name, (total, count) in terms.items():
            # MPS has no float64.
            wide = total.float() if total.device.type == "mps" else total.double()
            self._totals[name] = self._totals[name] + wide if name in self._totals else wide
            self._counts[name] = self._counts.get(name, 0.0) + count

    @property
    def names(self) -> list[str]:
        return list(self._totals)

    def stacked(self) -> torch.Tensor:
        """All totals, then all counts, one vector on the device."""
        totals = torch.stack([each.reshape(()) for each in self._totals.values()])
        known = [0.0 if isinstance(each, torch.Tensor) else each for each in self._counts.values()]
        counts = torch.tensor(known, dtype=totals.dtype).to(totals.device, non_blocking=True)
        for place, each in enumerate(self._counts.values()):
            if isinstance(each, torch.Tensor):
                counts[place] = each
        return torch.cat([totals, counts])


def gather(state: TrainState, names: list[str], values: list[float]) -> None:
    """Add a step's totals and counts (`Sums.stacked`, read) to the window that the next line of the log is a mean over."""
    for name, total, count in zip(names, values[: len(names)], values[len(names) :], strict=True):
        sums = state.window.setdefault(f"train/{name}", [0.0, 0.0])
        sums[0] += total
        sums[1] += count


def drain_window(state: TrainState) -> dict[str, float]:
    """Means of the metrics gathered since the last call, which begin anew."""
    means = {name: total / count for name, (total, count) in state.window.items() if count}
    state.window = {}
    return means
