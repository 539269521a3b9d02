"""Muon: momentum whose update is orthogonalized by Newton–Schulz iterations (Jordan et al., 2024).

Matrices of one shape are stacked, so that a whole model takes a few batched products.
Shape letters: S matrices of a stack, M rows, N columns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic whose iterates drive singular values to about 1 (Jordan et al., 2024)."""


def orthogonalize(matrices_SMN: torch.Tensor, n_steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The nearest semi-orthogonal matrices [S, M, N], singular values within about 0.7 to 1.2, computed in `dtype`."""
    a, b, c = _COEFFICIENTS
    x = matrices_SMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon over matrices [M, N]; an update is the orthogonalized momentum times lr · max(1, M / N)^½."""

    def __init__(
        self,
        params: Iterable[torch.Tensor] | list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps},
        )
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            stacks: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks.setdefault(parameter.shape, []).append(parameter)
            for parameters in stacks.values():
                self._step_stack(parameters, group)

    def _step_stack(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        grads = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        directions = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalize(torch.stack(list(directions)), group["ns_steps"], self.dtype)
        rows, columns = parameters[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-group["lr"] * scale)
