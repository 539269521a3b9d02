"""Norms and gates as torch knows them (`torch.ops.kajiya.…`): eager, fake and autograd, each on CPU tensors of float32 or bf16.

Importing this module registers them; the library is built at the first call. Each `plain_…` is the function behind an operator,
without what torch's dispatcher does about it. Shape letters: M tokens flattened, N query heads, K key heads, H width of a head,
D hidden width, F width of the gate.
"""

import ctypes
from typing import Any

import torch

from kajiya.models.native.library import HeadNorms, kind_of, load_library, operator, pointer


def plain_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x · rsqrt(mean x² + eps) · (weight + shift) of contiguous x [M, D], and the factors of each token, float32 [M]."""
    n_tokens, width = x.shape
    y, scales = torch.empty_like(x), x.new_empty(n_tokens, dtype=torch.float32)
    load_library().kajiya_norm_forward(
        kind_of(x),
        n_tokens,
        width,
        eps,
        shift,
        *(pointer(each) for each in (x, weight, y, scales)),
        torch.get_num_threads(),
    )
    return y, scales


rms_norm = operator("kajiya::rms_norm")(plain_rms_norm)


@rms_norm.register_fake
def _(x: Any, weight: Any, eps: float, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


def plain_rms_norm_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the weight."""
    grad_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    return plain_norm_grad(grad_y, x, weight, scales, shift, grad_weight), grad_weight.to(weight.dtype, copy=True)


def plain_norm_grad(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    shift: float,
    grad_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x; the weight's is written to the float32 `grad_weight`, where there is one."""
    grad_y, grad_x = grad_y.contiguous(), torch.empty_like(x)  # held by name: a pointer keeps nothing alive
    load_library().kajiya_norm_backward(
        kind_of(x),
        *x.shape,
        shift,
        *(pointer(each) for each in (x, weight, scales, grad_y, grad_x, grad_weight)),
        torch.get_num_threads(),
    )
    return grad_x


rms_norm_backward = operator("kajiya::rms_norm_backward")(plain_rms_norm_backward)


@rms_norm_backward.register_fake
def _(grad_y: Any, x: Any, weight: Any, scales: Any, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.shift = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_grads(ctx: Any, grad_y: torch.Tensor, _grad_scales: Any) -> Any:
    return (*rms_norm_backward(grad_y, *ctx.saved_tensors, ctx.shift), None, None)


rms_norm.register_autograd(_norm_grads, setup_context=_keep_norm)


def _head_norms(heads: torch.Tensor, n_kv: int, eps: float, shift: float) -> HeadNorms:
    n_tokens, n_all, width = heads.shape
    return HeadNorms(
        N=n_tokens, Q=n_all - 2 * n_kv, K=n_kv, D=width, eps=eps, shift=shift, n_threads=torch.get_num_threads()
    )


def plain_head_norms(
    heads: torch.Tensor, weights: torch.Tensor, n_kv: int, eps: float, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous heads [M, N + 2K, H], queries and keys each normed as by `rms_norm` with weights [2, H], and the factors.

    Values come back as they are. The factors are float32 [M, N + K].
    """
    y = torch.empty_like(heads)
    scales = heads.new_empty(len(heads), heads.shape[1] - n_kv, dtype=torch.float32)
    load_library().kajiya_head_norms_forward(
        kind_of(heads),
        ctypes.byref(_head_norms(heads, n_kv, eps, shift)),
        *(pointer(each) for each in (heads, weights, y, scales)),
    )
    return y, scales


head_norms = operator("kajiya::head_norms")(plain_head_norms)


@head_norms.register_fake
def _(heads: Any, weights: Any, n_kv: int, eps: float, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(heads), heads.new_empty(heads.shape[0], heads.shape[1] - n_kv, dtype=torch.float32)


def plain_head_norms_backward(
    grad_y: torch.Tensor, heads: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, n_kv: int, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the heads and of the weights."""
    grad_y = grad_y.contiguous()  # held by name: a pointer keeps nothing alive
    grad_heads, grad_weights = torch.empty_like(heads), weights.new_empty(weights.shape, dtype=torch.float32)
    load_library().kajiya_head_norms_backward(
        kind_of(heads),
        ctypes.byref(_head_norms(heads, n_kv, 0.0, shift)),
        *(pointer(each) for each in (heads, weights, scales, grad_y, grad_heads, grad_weights)),
    )
    return grad_heads, grad_weights.to(weights.dtype, copy=True)


head_norms_backward = operator("kajiya::head_norms_backward")(plain_head_norms_backward)


@head_norms_backward.register_fake
def _(grad_y: Any, heads: Any, weights: Any, scales: Any, n_kv: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(heads), torch.empty_like(weights)


def _keep_head_norms(ctx: Any, inputs: Any, output: Any) -> None:
    heads, weights, ctx.n_kv, _, ctx.shift = inputs
    ctx.save_for_backward(heads, weights, output[1])


def _head_norms_grads(ctx: Any, grad_y: torch.Tensor, _grad_scales: Any) -> Any:
    return (*head_norms_backward(grad_y, *ctx.saved_tensors, ctx.n_kv, ctx.shift), None, None, None)


head_norms.register_autograd(_head_norms_grads, setup_context=_keep_head_norms)


def plain_gated(both: torch.Tensor, gate: int) -> torch.Tensor:
    """gate(g) · up of contiguous [M, 2F], g first; the gate is a number of `GATES`. Returns [M, F]."""
    n_tokens, width = both.shape[0], both.shape[1] // 2
    y = both.new_empty(n_tokens, width)
    load_library().kajiya_gated_forward(
        kind_of(both), gate, n_tokens, width, pointer(both), pointer(y), torch.get_num_threads()
    )
    return y


gated = operator("kajiya::gated")(plain_gated)


@gated.register_fake
def _(both: Any, gate: int) -> torch.Tensor:
    made: torch.Tensor = both.new_empty(both.shape[0], both.shape[1] // 2)
    return made


def plain_gated_backward(grad_y: torch.Tensor, both: torch.Tensor, gate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `both`, and the result of the forward pass once more."""
    y = both.new_empty(both.shape[0], both.shape[1] // 2)
    return plain_gated_grad(grad_y, both, gate, y), y


def plain_gated_grad(
    grad_y: torch.Tensor, both: torch.Tensor, gate: int, y: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of `both`; the forward pass's result is written to `y`, where there is one."""
    grad_y, grad = grad_y.contiguous(), torch.empty_like(both)  # held by name: a pointer keeps nothing alive
    load_library().kajiya_gated_backward(
        kind_of(both),
        gate,
        both.shape[0],
        both.shape[1] // 2,
        *(pointer(each) for each in (both, grad_y, grad, y)),
        torch.get_num_threads(),
    )
    return grad


gated_backward = operator("kajiya::gated_backward")(plain_gated_backward)


@gated_backward.register_fake
def _(grad_y: Any, both: Any, gate: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(both), both.new_empty(both.shape[0], both.shape[1] // 2)


def _keep_gated(ctx: Any, inputs: Any, output: Any) -> None:
    both, ctx.gate = inputs
    ctx.save_for_backward(both)


def _gated_grads(ctx: Any, grad_y: torch.Tensor) -> Any:
    return gated_backward(grad_y, *ctx.saved_tensors, ctx.gate)[0], None


gated.register_autograd(_gated_grads, setup_context=_keep_gated)
