"""Muon: momentum whose update is orthogonalized by a few polynomial iterations (Jordan et al., 2024).

Matrices of one shape are stacked, so that a whole model takes a few batched products.
Shape letters: S matrices of a stack, M rows, N columns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Quintics of the Polar Express (Amsel et al., 2025, arXiv:2505.16932, algorithm 1), one an iteration; the last is repeated."""
_SAFETY = 1.01
"""In bf16 all of them but the last are taken at x over this, since rounding lifts a singular value above 1 (section 3.4)."""


def orthogonalize(matrices_SMN: torch.Tensor, n_steps: int, dtype: torch.dtype) -> torch.Tensor:
    """The polar factors [S, M, N] of a stack of matrices, singular values near 1, computed in `dtype`."""
    x = matrices_SMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    # A hundredth below 1, since rounding must not lift the largest singular value above it.
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    last = len(_COEFFICIENTS) - 1
    for step in range(n_steps):
        a, b, c = _COEFFICIENTS[min(step, last)]
        if dtype == torch.bfloat16 and step < last:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, quintic, x, beta=a, alpha=1.0)
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon over matrices [M, N] or stacks of them; an update is the orthogonalized momentum times lr · max(1, M / N)^½.

    M counts a matrix's outputs, N its inputs; the other way round in a group with `inputs_first`.
    """

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
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "inputs_first": False,
        }
        super().__init__(params, defaults)
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
        stack = torch.stack(list(directions))
        outputs, inputs = stack.shape[-2:]
        updates = orthogonalize(stack.view(-1, outputs, inputs), group["ns_steps"], self.dtype).view(stack.shape)
        if group["inputs_first"]:
            outputs, inputs = inputs, outputs
        scale = max(1.0, outputs / inputs) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-group["lr"] * scale)
