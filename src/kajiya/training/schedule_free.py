"""Schedule-free AdamW: the average of the iterates in place of a falling learning rate (Defazio et al., 2024, arXiv:2405.15682).

z is where plain AdamW stands, x the average of all z, and the weights that are trained are y = (1 − β₁) z + β₁ x. Only y (the
parameter itself) and z are kept; x = (y − (1 − β₁) z) / β₁.
"""

from collections.abc import Callable
from typing import Any

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Algorithm 1 of the paper: decay at y, and each z enters the average with weight lr²."""

    def __init__(self, params: list[dict[str, Any]], lr: float, beta1: float, beta2: float, eps: float) -> None:
        defaults = {"lr": lr, "weight_decay": 0.0, "beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, y: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[y]
        if not state:
            state |= {"z": y.detach().clone(), "exp_avg_sq": torch.zeros_like(y), "count": 0, "weights": 0.0}
        lr, beta1, beta2 = group["lr"], group["beta1"], group["beta2"]
        state["count"] += 1
        state["weights"] += lr**2
        share = lr**2 / state["weights"] if state["weights"] else 0.0
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (second / (1 - beta2 ** state["count"])).sqrt_().add_(group["eps"])
        update = (grad / scale).add_(y, alpha=group["weight_decay"])
        # x moves to (1 − c) x + c z', so that y' = β₁ (1 − c) x + (1 − β₁ (1 − c)) z' = y + …, written without x.
        z = state["z"]
        y.lerp_(z, share)
        y.add_(update, alpha=lr * (beta1 * (1 - share) - 1))
        z.sub_(update, alpha=lr)

    @torch.no_grad()
    def averaged(self, parameter: torch.Tensor) -> torch.Tensor:
        """x, the average."""
        beta1 = next(g["beta1"] for g in self.param_groups if any(parameter is each for each in g["params"]))
        z: torch.Tensor = self.state[parameter]["z"]
        return torch.lerp(z, parameter, 1 / beta1)
