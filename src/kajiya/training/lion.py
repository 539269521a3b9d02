"""Lion: the sign of an interpolated momentum (Chen et al., 2023, arXiv:2302.06675, algorithm 2)."""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """θ ← θ − lr · (sign(β₁ m + (1 − β₁) g) + λ θ), then m ← β₂ m + (1 − β₂) g; one slot a parameter."""

    def __init__(self, params: list[dict[str, Any]], lr: float, beta1: float, beta2: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            signs = torch._foreach_sign(torch._foreach_lerp(momenta, grads, 1 - group["beta1"]))
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(signs), alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 1 - group["beta2"])
