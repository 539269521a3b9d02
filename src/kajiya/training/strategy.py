"""How one optimizer step is spread over devices. The loop never asks which strategy it has."""

from typing import Any, Protocol

import torch
from torch import nn

from kajiya.training.loss_scale import LossScale
from kajiya.training.losses import Loss, Terms
from kajiya.training.masters import MasterOptimizer
from kajiya.training.precision import Precision
from kajiya.training.ranks import Ranks


class Strategy(Protocol):
    """What the loop needs: place the model, add up over the ranks, go forward and backward, clip, step, remember."""

    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on its device and in its precision, ready for forward passes."""
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values summed over all ranks, the same on each."""
        ...

    def from_first(self, value: float) -> float:
        """The first rank's value, on every rank."""
        ...

    def forward(self, model: nn.Module, loss: Loss, batch: Any, *, is_last: bool) -> tuple[Terms, Terms]:
        """The loss of a micro-batch; `is_last` of its group."""
        ...

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of `value`, this rank's part of the loss, to the parameters'."""
        ...

    def add_up(self, optimizer: MasterOptimizer) -> None:
        """The gradient of one of several micro-batches of a step is complete."""
        ...

    def clip(self, optimizer: MasterOptimizer, max_norm: float | None) -> torch.Tensor:
        """Global norm of the gradient (float32 scalar), which is scaled down to `max_norm` where it is larger."""
        ...

    def step(self, optimizer: MasterOptimizer, lr: float) -> None:
        """One update of the parameters."""
        ...

    def refuse(self, optimizer: MasterOptimizer) -> bool:
        """Forget a gradient that is not finite; whether the loss scale was too large, which explains it."""
        ...

    def state(self) -> dict[str, Any]:
        """What the strategy itself must remember across a resume, as plain numbers."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


class SingleProcess:
    """One process, one device."""

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device = device
        self.precision = precision
        self.scale = LossScale(precision.is_scaled)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the precision's weights dtype, in training mode."""
        return self.precision.convert(model.to(device=self.device, dtype=self.precision.weights)).train()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """One process sees everything."""
        return values

    def from_first(self, value: float) -> float:
        """This is the first."""
        return value

    def forward(self, model: nn.Module, loss: Loss, batch: Any, *, is_last: bool) -> tuple[Terms, Terms]:
        """The loss under autocast where the precision has it."""
        with self.precision.context(self.device):
            return loss(model, batch)

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of `value`, times the loss scale."""
        (value * self.scale.factor if self.scale.is_on else value).backward()

    def add_up(self, optimizer: MasterOptimizer) -> None:
        """Sums are float32."""
        optimizer.add_up()

    def clip(self, optimizer: MasterOptimizer, max_norm: float | None) -> torch.Tensor:
        """Global norm in float32, without the loss scale; scales in place."""
        grads = optimizer.grads()
        if self.scale.is_on:
            torch._foreach_div_(grads, self.scale.factor)
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
        if max_norm is not None:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, optimizer: MasterOptimizer, lr: float) -> None:
        """One update at rate `lr`."""
        optimizer.step(lr)
        self.scale.stepped()

    def refuse(self, optimizer: MasterOptimizer) -> bool:
        """Forget the gradient, lower the loss scale."""
        optimizer.clear_grads()
        return self.scale.overflowed()

    def state(self) -> dict[str, Any]:
        """The loss scale, where there is one."""
        return self.scale.state() if self.scale.is_on else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with a loss scale."""
        if state:
            self.scale.load_state(state)


class DataParallel:
    """The same model on every rank, each with its own micro-batches; torch's DistributedDataParallel adds the gradients up.

    What one rank does by itself is a `SingleProcess`'s. The group of ranks must have been joined.
    """

    def __init__(self, device: torch.device, precision: Precision, ranks: Ranks) -> None:
        self.device = device
        self.ranks = ranks
        self._own = SingleProcess(device, precision)
        self._replica: nn.parallel.DistributedDataParallel | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device, its weights the first rank's."""
        prepared = self._own.prepare(model)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        self._replica = nn.parallel.DistributedDataParallel(
            _Call(prepared), device_ids=device_ids, gradient_as_bucket_view=True
        )
        return prepared

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """One all-reduce."""
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def from_first(self, value: float) -> float:
        """One broadcast, on the CPU."""
        shared = torch.tensor(value, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def forward(self, model: nn.Module, loss: Loss, batch: Any, *, is_last: bool) -> tuple[Terms, Terms]:
        """The loss through the replica; the ranks exchange gradients in the backward pass of the group's last micro-batch."""
        if self._replica is None:
            raise AssertionError("prepare() makes the replica")
        self._replica.require_backward_grad_sync = is_last
        with self._own.precision.context(self.device):
            result: tuple[Terms, Terms] = self._replica(loss, batch)
        return result

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient; DistributedDataParallel takes the mean over ranks, and the sum is wanted."""
        self._own.backward(value * self.ranks.n)

    def add_up(self, optimizer: MasterOptimizer) -> None:
        """The replica adds up itself, in the gradients' own dtype, what the ranks exchange at the last micro-batch."""

    def clip(self, optimizer: MasterOptimizer, max_norm: float | None) -> torch.Tensor:
        """As one process does: every rank has the whole gradient."""
        return self._own.clip(optimizer, max_norm)

    def step(self, optimizer: MasterOptimizer, lr: float) -> None:
        """The same update on every rank."""
        self._own.step(optimizer, lr)

    def refuse(self, optimizer: MasterOptimizer) -> bool:
        """The same on every rank."""
        return self._own.refuse(optimizer)

    def state(self) -> dict[str, Any]:
        """The same on every rank."""
        return self._own.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """The same on every rank."""
        self._own.load_state(state)


class _Call(nn.Module):
    """A forward pass that is the loss, as DistributedDataParallel wants one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Loss, batch: Any) -> tuple[Terms, Terms]:
        return loss(self.model, batch)


def open_strategy(device: torch.device, precision: Precision, ranks: Ranks) -> Strategy:
    """The strategy for this process."""
    return SingleProcess(device, precision) if ranks.n == 1 else DataParallel(device, precision, ranks)
