"""Products of a joined block with what stands before them, forward and backward; matrices that lie behind each other, as one.

Shape letters: M tokens, D hidden width, F width of the gate.
"""

from typing import Any

import torch


def whole(weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The matrices as one: a view where they lie one behind the other, else a copy."""
    first = weights[0]
    at = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != at or not weight.is_contiguous():
            return torch.cat(weights)
        at += weight.numel() * weight.element_size()
    n_rows = sum(len(weight) for weight in weights)
    if first.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        return torch.cat(weights)
    return first.as_strided((n_rows, first.shape[1]), first.stride(), first.storage_offset())


class NormProduct(torch.autograd.Function):
    """norm(x) · Wᵀ of x [M, D] and the matrices, joined; the normed x is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, norm_weight: Any, eps: float, shift: float, *weights: torch.Tensor) -> torch.Tensor:
        y, _ = torch.ops.kajiya.rms_norm(x, norm_weight, eps, shift)
        ctx.save_for_backward(x, norm_weight, *weights)
        ctx.eps, ctx.shift = eps, shift
        product: torch.Tensor = y @ whole(weights).T
        return product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, norm_weight, *weights = ctx.saved_tensors
        y, scales = torch.ops.kajiya.rms_norm(x, norm_weight, ctx.eps, ctx.shift)
        joined = whole(tuple(weights))
        grads: list[Any] = [None] * len(weights)
        if any(ctx.needs_input_grad[4:]):
            grads = list((grad.T @ y).split([len(weight) for weight in weights]))
        grad_x, grad_norm = torch.ops.kajiya.rms_norm_backward(grad @ joined, x, norm_weight, scales, ctx.shift)
        return grad_x, grad_norm if ctx.needs_input_grad[1] else None, None, None, *grads


class GatedProduct(torch.autograd.Function):
    """(gate(g) · up) · Wᵀ of both halves [M, 2F]; what is multiplied is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, both: Any, gate: int, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(both, weight)
        ctx.gate = gate
        product: torch.Tensor = torch.ops.kajiya.gated(both, gate) @ weight.T
        return product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        both, weight = ctx.saved_tensors
        grad_both, y = torch.ops.kajiya.gated_backward(grad @ weight, both, ctx.gate)
        return grad_both, None, grad.T @ y if ctx.needs_input_grad[2] else None
