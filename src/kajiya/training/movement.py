"""After the first steps: every trainable tensor has moved, and every frozen one is what it was."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from kajiya.errors import TrainingError
from kajiya.models.quantized import plain_tensors
from kajiya.training.masters import MasterOptimizer
from kajiya.training.state import TrainState

_STEPS = 3
"""Updates before the look: a matrix behind one that begins at zero gets its first gradient in the second step."""
_NAMED = 5


class Movement:
    """Checksums of all tensors at the beginning, compared once a few updates have been made."""

    def __init__(self, model: nn.Module, optimizer: MasterOptimizer, state: TrainState) -> None:
        self._trained = optimizer.masters
        trained = {id(parameter) for parameter in optimizer.parameters.values()}
        self._frozen = {name: p for name, p in model.named_parameters() if id(p) not in trained}
        self._before = {"trained": checksums(self._trained), "frozen": checksums(self._frozen)}
        self._began = _updates(state)
        self._is_done = False

    def check(self, state: TrainState, tell: Callable[[str], object]) -> None:
        """Look when it is time, once. Raises `TrainingError` for a frozen tensor that moved, or when nothing moved at all."""
        if self._is_done or _updates(state) < self._began + _STEPS:
            return
        self._is_done = True
        moved = changed(self._before["frozen"], checksums(self._frozen))
        if moved:
            raise TrainingError(
                f"step {state.step}: {len(moved)} frozen tensors changed, which nothing may: {_some(moved)}\n"
                "Something else than the optimizer writes to them: look for code of the model that does."
            )
        after = checksums(self._trained)
        still = sorted(after.keys() - changed(self._before["trained"], after))
        if len(still) == len(after):
            raise TrainingError(f"step {state.step}: not one trainable tensor moved in {_STEPS} updates")
        if still:
            tell(
                f"{len(still)} of {len(after)} trainable tensors did not move in {_STEPS} updates: {_some(still)}. "
                "Either the loss does not depend on them, or they get no gradient"
            )


def _updates(state: TrainState) -> int:
    return state.step - state.skipped - state.spikes - state.overflows


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Sum of each tensor's bits as whole numbers, read from the device at once."""
    if not tensors:
        return {}
    sums = [torch.stack([_bits(part) for part in plain_tensors(t.detach())]).sum() for t in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist(), strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)


def changed(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Names whose checksums are not the same."""
    return sorted(name for name in before if before[name] != after[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
