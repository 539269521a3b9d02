"""`MasterOptimizer`, which the loop drives: torch optimizers over float32 masters, all state by parameter name."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from kajiya.errors import StoreError
from kajiya.training.rounding_adamw import RoundingAdamW

_UPDATES = "average/updates"
"""Key of the count of updates behind the averages; no parameter's name."""


@runtime_checkable
class Averaging(Protocol):
    """An optimizer whose own average of the weights is what it promises; the weights that it trains are others."""

    def averaged(self, parameter: torch.Tensor) -> torch.Tensor:
        """The averaged value of a parameter, a new tensor."""
        ...


class MasterOptimizer:
    """One or more torch optimizers over float32 masters of the model's parameters.

    A parameter in float32 is its own master. One in bf16 or fp16 has a float32 copy that is updated and rounded back after
    each step, so that small updates are not lost; a master in the host's memory is a copy too. With `ema_decay`, an exponential
    average of the masters is kept beside them.
    """

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        masters: dict[str, torch.Tensor],
        optimizers: list[torch.optim.Optimizer],
        peak_lr: float,
        ema_decay: float | None = None,
    ) -> None:
        self.parameters = parameters
        self.masters = masters
        self.optimizers = optimizers
        self._ratios = [[group["lr"] / peak_lr for group in each.param_groups] for each in optimizers]
        self._copied = [name for name in parameters if masters[name] is not parameters[name]]
        rounding = {id(p) for each in optimizers if isinstance(each, RoundingAdamW) for p in _trained_by(each)}
        self._left = [name for name in self._copied if id(masters[name]) not in rounding]
        self._ema_decay = ema_decay
        self._ema = {} if ema_decay is None else {name: tensor.detach().clone() for name, tensor in masters.items()}
        self._updates = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (each group keeps its ratio to the peak), then clear the gradients."""
        self.add_up([name for name in self._copied if name in self._left or self.masters[name].grad is not None])
        for optimizer, ratios in zip(self.optimizers, self._ratios, strict=True):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = lr * ratio
            optimizer.step()
        self._round(self._left)
        if self._ema_decay is not None:
            self._updates += 1
            # The first updates weigh more, or the random beginning would stay in the average for long.
            decay = min(self._ema_decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(list(self._ema.values()), [self.masters[name] for name in self._ema], 1 - decay)
        self.clear_grads()

    def applied_rate(self, lr: float) -> float:
        """What the last update made of the rate `lr`: torch's Adafactor holds that of its update t under 1/√t."""
        adafactors = [each for each in self.optimizers if isinstance(each, torch.optim.Adafactor)]
        counts = [float(state["step"]) for each in adafactors for state in each.state.values()]
        return min(lr, max(counts) ** -0.5) if counts else lr

    @torch.no_grad()
    def add_up(self, names: Iterable[str] | None = None) -> None:
        """Add the gradients at hand to the masters' own (of these names alone), in float32: a sum in bf16 loses what is small."""
        for name in self._copied if names is None else names:
            parameter, master = self.parameters[name], self.masters[name]
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(master.device, torch.float32)
            else:
                master.grad.add_(parameter.grad.to(master.device))
            parameter.grad = None  # one of the two is enough to hold

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model's weights are the averaged ones, where there is an average (EMA, schedule-free)."""
        averages = self._averages()
        own = {name: self.masters[name].detach().clone() for name in averages if name not in self._copied}
        with torch.no_grad():
            for name, tensor in averages.items():
                self.parameters[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    self.parameters[name].copy_(tensor)
                self._round([name for name in averages if name in self._copied])

    def _averages(self) -> dict[str, torch.Tensor]:
        if self._ema:
            return self._ema
        names = {id(tensor): name for name, tensor in self.masters.items()}
        return {
            names[id(tensor)]: each.averaged(tensor)
            for each in self.optimizers
            if isinstance(each, Averaging)
            for tensor in each.state
        }

    def _round(self, names: list[str]) -> None:
        """Bring the masters' values into the model's parameters."""
        if names:
            torch._foreach_copy_([self.parameters[name] for name in names], [self.masters[name] for name in names])

    def clear_grads(self) -> None:
        """Forget all gradients."""
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    def grads(self) -> list[torch.Tensor]:
        """Gradients at hand, in the order of the parameters."""
        return list(self.named_grads().values())

    def named_grads(self) -> dict[str, torch.Tensor]:
        """Gradients at hand by the parameter's name: the masters' float32 sums, where micro-batches have been added up."""
        held = {name: (self.masters[name].grad, tensor.grad) for name, tensor in self.parameters.items()}
        found = {name: own if summed is None else summed for name, (summed, own) in held.items()}
        return {name: grad for name, grad in found.items() if grad is not None}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The whole state by parameter name: `master/<name>` and `<slot>/<name>`.

        Plain numbers of a slot are 0-d tensors, float64 or int64, which no torch optimizer keeps by itself.
        """
        names = {id(tensor): name for name, tensor in self.masters.items()}
        state = {f"master/{name}": tensor.detach() for name, tensor in self.masters.items()}
        for optimizer in self.optimizers:
            for tensor, slots in optimizer.state.items():
                for slot, value in slots.items():
                    if value is not None:
                        state[f"{slot}/{names[id(tensor)]}"] = _as_tensor(value)
        if self._ema:
            state |= {f"ema/{name}": tensor for name, tensor in self._ema.items()}
            state[_UPDATES] = torch.tensor(self._updates)
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave; raises `StoreError` when the parameters are not the same."""
        given = dict(state)
        if (_UPDATES in given) != bool(self._ema):
            raise StoreError("the checkpoint has an average of the weights, or the run, but not both (train.ema_decay)")
        self._updates = int(given.pop(_UPDATES, torch.tensor(0)))
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in given.items():
            slot, _, name = key.partition("/")
            by_name.setdefault(name, {})[slot] = value
        if by_name.keys() != self.masters.keys():
            odd = sorted(by_name.keys() ^ self.masters.keys())[0]
            raise StoreError(f"the checkpoint's parameters are not the model's: {odd!r} is in one of them only")
        owners = {
            id(p): (each, group) for each in self.optimizers for group in each.param_groups for p in group["params"]
        }
        for name, slots in by_name.items():
            master = self.masters[name]
            master.copy_(slots.pop("master"))
            self.parameters[name].copy_(master)
            if self._ema:
                self._ema[name].copy_(slots.pop("ema"))
            optimizer, group = owners[id(master)]
            restored = {slot: _restored(slot, value, master, group) for slot, value in slots.items()}
            if restored:
                optimizer.state[master] = restored

    def reset(self, state: dict[str, torch.Tensor]) -> None:
        """Go back to an earlier `state_tensors`, a slot that was not there then included."""
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.load_state_tensors(state)


def _trained_by(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _restored(slot: str, value: torch.Tensor, master: torch.Tensor, group: dict[str, Any]) -> Any:
    """A slot's value as the optimizer had it: a number of its own, or a tensor where the optimizer keeps it."""
    if value.ndim == 0 and value.dtype in (torch.float64, torch.int64):
        return value.item()
    # torch keeps the count of steps on the CPU, unless the optimizer is one fused kernel.
    if slot == "step" and not group.get("fused"):
        return value.clone()
    return value.to(master.device, copy=True)
