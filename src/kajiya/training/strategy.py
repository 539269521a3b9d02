"""How one optimizer step is spread over devices. The loop never asks which strategy it has."""

from typing import Any, Protocol

import torch
from torch import nn

from kajiya.models.quantized import plain_tensors
from kajiya.training.checkpoint import state_buffers
from kajiya.training.exchange import Exchange, fill_gradients, take_first_ranks
from kajiya.training.loss_scale import LossScale
from kajiya.training.losses import Loss, Terms
from kajiya.training.masters import MasterOptimizer
from kajiya.training.precision import Precision
from kajiya.training.ranks import Ranks
from kajiya.training.rounding_adamw import norm_of


class Strategy(Protocol):
    """What the loop needs: place the model, add up over the ranks, go forward and backward, clip, step, remember."""

    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on its device and in its precision, ready for forward passes."""
        ...

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values summed over all ranks, the same on each."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; no device is waited for."""
        ...

    def from_first(self, value: float) -> float:
        """The first rank's value, on every rank."""
        ...

    def forward(self, model: nn.Module, loss: Loss, batch: Any) -> tuple[Terms, Terms]:
        """The loss of a micro-batch."""
        ...

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of `value`, this rank's part of the loss, to the parameters'."""
        ...

    def add_up(self, optimizer: MasterOptimizer, n: int) -> None:
        """The gradient of one of a step's `n` micro-batches is complete. Nothing up to here waits for another rank."""
        ...

    def exchange(self, optimizer: MasterOptimizer) -> None:
        """The gradient of the step is complete on every rank: each gets the sum. Takes no memory but for tensors without one."""
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

    def any(self, flag: bool) -> bool:
        """This is the only one."""
        return flag

    def from_first(self, value: float) -> float:
        """This is the first."""
        return value

    def forward(self, model: nn.Module, loss: Loss, batch: Any) -> tuple[Terms, Terms]:
        """The loss under autocast where the precision has it."""
        with self.precision.context(self.device):
            return loss(model, batch)

    def backward(self, value: torch.Tensor) -> None:
        """Add the gradient of `value`, times the loss scale."""
        (value * self.scale.factor if self.scale.is_on else value).backward()

    def add_up(self, optimizer: MasterOptimizer, n: int) -> None:
        """Sums are float32."""
        if n > 1:
            optimizer.add_up()

    def exchange(self, optimizer: MasterOptimizer) -> None:
        """One process has it all."""

    def clip(self, optimizer: MasterOptimizer, max_norm: float | None) -> torch.Tensor:
        """Global norm in float32, without the loss scale; scales in place."""
        grads = optimizer.grads()
        if self.scale.is_on:
            torch._foreach_div_(grads, self.scale.factor)
        norm = norm_of(grads)
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
    """The same model on every rank, each with its own micro-batches; their gradients are added up once a step.

    What one rank does by itself is a `SingleProcess`'s. The group of ranks must have been joined. A rank adds its micro-batches
    up in float32, and so are the ranks' sums: the result is that of one process. Nothing is exchanged within a backward pass
    (as DistributedDataParallel does it, in the gradients' own dtype), so that a rank that runs out of memory leaves no other
    waiting, and a tensor without a gradient is no error.
    """

    def __init__(self, device: torch.device, precision: Precision, ranks: Ranks) -> None:
        self.device = device
        self.ranks = ranks
        self._own = SingleProcess(device, precision)
        self._exchange = Exchange(device)
        self._model: nn.Module | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the device, its weights and buffers the first rank's."""
        prepared = self._own.prepare(model)
        for tensor in (*prepared.parameters(), *prepared.buffers()):
            take_first_ranks(plain_tensors(tensor.detach()))
        self._model = prepared
        return prepared

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """One all-reduce."""
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """One all-reduce, on the CPU."""
        return bool(self.sum(torch.tensor(float(flag))))

    def from_first(self, value: float) -> float:
        """One broadcast, on the CPU."""
        shared = torch.tensor(value, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def forward(self, model: nn.Module, loss: Loss, batch: Any) -> tuple[Terms, Terms]:
        """As one process does."""
        return self._own.forward(model, loss, batch)

    def backward(self, value: torch.Tensor) -> None:
        """As one process does."""
        self._own.backward(value)

    def add_up(self, optimizer: MasterOptimizer, n: int) -> None:
        """In float32, a single micro-batch too; the memory of the exchange is taken."""
        optimizer.add_up()
        self._exchange.reserve(sum(master.numel() for master in optimizer.masters.values()))

    def exchange(self, optimizer: MasterOptimizer) -> None:
        """The sum over ranks, in float32; buffers of the model's state, which a forward pass may change, are the first's."""
        masters = list(optimizer.masters.values())
        fill_gradients(masters)
        self._exchange.add_up([master.grad for master in masters if master.grad is not None])
        if self._model is not None:
            take_first_ranks(list(state_buffers(self._model).values()))

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


def open_strategy(device: torch.device, precision: Precision, ranks: Ranks) -> Strategy:
    """The strategy for this process."""
    return SingleProcess(device, precision) if ranks.n == 1 else DataParallel(device, precision, ranks)
