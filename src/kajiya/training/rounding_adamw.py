"""AdamW over float32 masters of bf16 weights in one pass of a C++ operator, and the norm of a gradient in one.

torch's own AdamW wants gradients in the masters' dtype: a copy of each before the update, and a rounding of each master after it.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kajiya.models.native.library import AdamW, fits, kind_of, load_library, native_problem, pointer


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) that takes a master's gradient, else its weight's own, and writes the weight, too.

    `weights` is the bf16 parameter of each master, by the master's id. State and settings are those of `torch.optim.AdamW`.
    """

    def __init__(self, groups: list[dict[str, Any]], weights: Mapping[int, torch.Tensor]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.weights = {id(master): weights[id(master)] for group in self.param_groups for master in group["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every master that has a gradient, and its weight."""
        for group in self.param_groups:
            having = [(master, grad) for master in group["params"] if (grad := self._gradient(master)) is not None]
            for dtype in (torch.float32, torch.bfloat16):
                some = [(master, grad) for master, grad in having if grad.dtype == dtype]
                if some:
                    self._update(group, [master for master, _ in some], [grad.contiguous() for _, grad in some])

    def _gradient(self, master: torch.Tensor) -> torch.Tensor | None:
        return self.weights[id(master)].grad if master.grad is None else master.grad

    def _update(self, group: dict[str, Any], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        for master in masters:
            if not self.state[master]:
                self.state[master] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }
        states = [self.state[master] for master in masters]
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1)
        # Held by name until the call is over: an address keeps nothing alive.
        arrays: dict[str, ctypes.Array[Any]] = {
            "sizes": (ctypes.c_int64 * len(masters))(*(master.numel() for master in masters)),
            "steps": (ctypes.c_double * len(masters))(*torch.stack(counts).tolist()),
            "grads": _addresses(grads),
            "masters": _addresses(masters),
            "means": _addresses([state["exp_avg"] for state in states]),
            "squares": _addresses([state["exp_avg_sq"] for state in states]),
            "weights": _addresses([self.weights[id(master)] for master in masters]),
        }
        beta1, beta2 = group["betas"]
        arguments = AdamW(
            n_tensors=len(masters),
            **{name: ctypes.addressof(array) for name, array in arrays.items()},
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay=group["weight_decay"],
            n_threads=torch.get_num_threads(),
        )
        load_library().kajiya_adamw(kind_of(grads[0]), ctypes.byref(arguments))


def rounding(optimizer: torch.optim.Optimizer, weights: Mapping[int, torch.Tensor]) -> torch.optim.Optimizer:
    """torch's AdamW as a `RoundingAdamW`, where all that it trains are masters of bf16 weights on a CPU; else the optimizer itself.

    `weights` is the parameter of each master, by the master's id; some are their own masters.
    """
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    settings = [group.get(name) for group in optimizer.param_groups for name in ("amsgrad", "maximize")]
    is_plain = type(optimizer) is torch.optim.AdamW and not optimizer.state and not any(settings)
    if is_plain and all(_is_rounded(master, weights[id(master)]) for master in masters) and native_problem() is None:
        return RoundingAdamW(optimizer.param_groups, weights)
    return optimizer


def _is_rounded(master: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == master.device.type == "cpu"
        and weight.is_contiguous()
        and master.is_contiguous()
    )


def norm_of(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all the gradients together, a float32 scalar on the first one's device."""
    if fits(*grads) and all(grad.is_contiguous() for grad in grads) and native_problem() is None:
        sums = (ctypes.c_double * len(grads))()
        sizes = (ctypes.c_int64 * len(grads))(*(grad.numel() for grad in grads))
        tensors = _addresses(grads)
        load_library().kajiya_squares(kind_of(grads[0]), len(grads), tensors, sizes, sums, torch.get_num_threads())
        return torch.tensor(sum(sums), dtype=torch.float64).sqrt().float()
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    return norm


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(pointer(tensor) for tensor in tensors))
