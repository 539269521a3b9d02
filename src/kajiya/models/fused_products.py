"""Products of a joined block with what stands before them, forward and backward; matrices that lie behind each other, as one.

Shape letters: M tokens, D hidden width, F width of the gate.
"""

from typing import Any

import torch

from kajiya.models.native.library import is_plain_call


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
    """norm(x) · Wᵀ of x [M, D] and the matrices, joined. The normed x is kept where a matrix learns, which needs it once more."""

    @staticmethod
    def forward(ctx: Any, x: Any, norm_weight: Any, eps: float, shift: float, *weights: torch.Tensor) -> torch.Tensor:
        y, scales = _norm(x, norm_weight, eps, shift)
        ctx.save_for_backward(x, norm_weight, scales, y if any(ctx.needs_input_grad[4:]) else None, *weights)
        ctx.shift = shift
        joined = whole(weights)
        # A view costs nothing to keep; a copy is made again.
        ctx.joined = joined if is_plain_call() and joined.data_ptr() == weights[0].data_ptr() else None
        product: torch.Tensor = y @ joined.T
        return product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, norm_weight, scales, y, *weights = ctx.saved_tensors
        grads: list[Any] = [None] * len(weights)
        if y is not None:
            grads = list((grad.T @ y).split([len(weight) for weight in weights]))
        joined = whole(tuple(weights)) if ctx.joined is None else ctx.joined
        grad_x, grad_norm = _norm_backward(ctx, grad @ joined, x, norm_weight, scales)
        return grad_x, grad_norm, None, None, *grads


class GatedProduct(torch.autograd.Function):
    """(gate(g) · up) · Wᵀ of both halves [M, 2F]. Where the matrix learns, its input is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, both: Any, gate: int, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(both, weight)
        ctx.gate = gate
        product: torch.Tensor = _gated(both, gate) @ weight.T
        return product

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        both, weight = ctx.saved_tensors
        grad_both, y = _gated_backward(grad @ weight, both, ctx.gate, needs_result=ctx.needs_input_grad[2])
        return grad_both, None, None if y is None or not ctx.needs_input_grad[2] else grad.T @ y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float, shift: float) -> torch.Tensor:
        from kajiya.models.native.pointwise import plain_rms_norm

        y, scales = plain_rms_norm(x, weight, eps, shift)
        ctx.save_for_backward(x, weight, scales)
        ctx.shift = shift
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return *_norm_backward(ctx, grad, *ctx.saved_tensors), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Any, gate: int) -> torch.Tensor:
        ctx.save_for_backward(both)
        ctx.gate = gate
        return _gated(both, gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        return _gated_backward(grad, both, ctx.gate, needs_result=False)[0], None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, first: Any, scale: float) -> torch.Tensor:
        from kajiya.models.native.operators import plain_attention

        out, log_sums = plain_attention(q, k, v, first, scale)
        ctx.save_for_backward(q, k, v, first, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        from kajiya.models.native.operators import attention_backward, plain_attention_backward

        q, k, v, first, out, log_sums = ctx.saved_tensors
        call = plain_attention_backward if is_plain_call() else attention_backward
        return *call(grad, q, k, v, first, ctx.scale, out, log_sums), None, None


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Any, first: Any, cos: Any, sin: Any, n_kv: int, scale: float) -> torch.Tensor:
        from kajiya.models.native.operators import plain_rotary_attention

        out, log_sums = plain_rotary_attention(qkv, first, cos, sin, n_kv, scale)
        ctx.save_for_backward(qkv, first, cos, sin, out, log_sums)
        ctx.n_kv, ctx.scale = n_kv, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        from kajiya.models.native.operators import plain_rotary_attention_backward, rotary_attention_backward

        qkv, first, cos, sin, out, log_sums = ctx.saved_tensors
        call = plain_rotary_attention_backward if is_plain_call() else rotary_attention_backward
        return call(grad, qkv, first, cos, sin, ctx.n_kv, ctx.scale, out, log_sums), None, None, None, None, None


def rms_normed(x_MD: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> torch.Tensor:
    """x · rsqrt(mean x² + eps) · (weight + shift) of contiguous x [M, D]."""
    normed: torch.Tensor = (
        _Norm.apply(x_MD, weight, eps, shift)
        if is_plain_call()
        else torch.ops.kajiya.rms_norm(x_MD, weight, eps, shift)[0]
    )
    return normed


def gated(both: torch.Tensor, gate: int) -> torch.Tensor:
    """gate(g) · up of both halves [M, 2F]."""
    result: torch.Tensor = _Gated.apply(both, gate) if is_plain_call() else torch.ops.kajiya.gated(both, gate)
    return result


def attention(
    q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, first_BT: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention [B, T, N, H], each query from its first key on."""
    arguments = (q_BNTH, k_BKTH, v_BKTH, first_BT, scale)
    attended: torch.Tensor = (
        _Attention.apply(*arguments) if is_plain_call() else torch.ops.kajiya.attention(*arguments)[0]
    )
    return attended


def rotary_attention(
    qkv: torch.Tensor, first: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_kv: int, scale: float
) -> torch.Tensor:
    """Causal attention [B, T, N, H] of heads [B, T, N + 2K, H], turned by the angles, each query from its first key on."""
    arguments = (qkv, first, cos, sin, n_kv, scale)
    attended: torch.Tensor = (
        _RotaryAttention.apply(*arguments) if is_plain_call() else torch.ops.kajiya.rotary_attention(*arguments)[0]
    )
    return attended


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    from kajiya.models.native.pointwise import plain_rms_norm, rms_norm

    return (plain_rms_norm if is_plain_call() else rms_norm)(x, weight, eps, shift)


def _norm_backward(
    ctx: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of x and of the weight; `ctx` says if the second, its input 1, is wanted."""
    from kajiya.models.native.pointwise import plain_norm_grad, plain_rms_norm_backward, rms_norm_backward

    arguments, is_plain = (grad, x, weight, scales, ctx.shift), is_plain_call()
    if is_plain and not ctx.needs_input_grad[1]:
        return plain_norm_grad(*arguments), None
    grad_x, grad_weight = (plain_rms_norm_backward if is_plain else rms_norm_backward)(*arguments)
    return grad_x, grad_weight if ctx.needs_input_grad[1] else None


def _gated(both: torch.Tensor, gate: int) -> torch.Tensor:
    from kajiya.models.native.pointwise import gated, plain_gated

    return (plain_gated if is_plain_call() else gated)(both, gate)


def _gated_backward(
    grad: torch.Tensor, both: torch.Tensor, gate: int, *, needs_result: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of `both`, and the forward pass's result once more, which may be left out where it is not needed."""
    from kajiya.models.native.pointwise import gated_backward, plain_gated_backward, plain_gated_grad

    if is_plain_call() and not needs_result:
        return plain_gated_grad(grad, both, gate), None
    return (plain_gated_backward if is_plain_call() else gated_backward)(grad, both, gate)
