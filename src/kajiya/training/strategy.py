"""How one optimizer step is spread over devices. The loop never asks which strategy it has."""

from typing import Any, Protocol

import torch
from torch import nn

from kajiya.training.masters import MasterOptimizer
from kajiya.training.precision import Precision


class Strategy(Protocol):
    """What the loop needs: place the model, add up counts, go backward, clip, step."""

    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on its device and in its precision, ready for forward passes."""
        ...

    def sum_counts(self, counts: dict[str, float]) -> dict[str, float]:
        """Counts of the group, summed over all ranks."""
        ...

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of `value` to the parameters'."""
        ...

    def clip(self, optimizer: MasterOptimizer, max_norm: float | None) -> torch.Tensor:
        """Global norm of the gradient (float32 scalar), which is scaled down to `max_norm` where it is larger."""
        ...

    def step(self, optimizer: MasterOptimizer, lr: float) -> None:
        """One update of the parameters."""
        ...

    def state(self) -> dict[str, Any]:
        """What the strategy itself must remember across a resume, as plain numbers."""
        ...


class SingleProcess:
    """One process, one device."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device = device
        self.precision = precision

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the precision's weights dtype, in training mode."""
        return model.to(device=self.device, dtype=self.precision.weights).train()

    def sum_counts(self, counts: dict[str, float]) -> dict[str, float]:
        """One process sees the whole group."""
        return counts

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of `value`."""
        value.backward()

    def clip(self, optimizer: MasterOptimizer, max_norm: float | None) -> torch.Tensor:
        """Global norm in float32; scales in place."""
        grads = optimizer.grads()
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if max_norm is not None:
            torch._foreach_mul_(grads, (max_norm / (norm.float() + 1e-6)).clamp(max=1.0).to(grads[0].dtype))
        return norm.float()

    def step(self, optimizer: MasterOptimizer, lr: float) -> None:
        """One update at rate `lr`."""
        optimizer.step(lr)

    def state(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}
