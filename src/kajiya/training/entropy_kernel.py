"""The loss's softmax of a chunk of logits as one Triton kernel, which torch knows as `kajiya::entropy`: eager, fake and autograd.

A program takes one token: it reads the token's logits from memory for their sums, from the cache for their gradient, and leaves
out a token without weight. Torch's own operators pass over memory eight times and hold the chunk in float32. Importing this
module needs Triton. Shape letters: C tokens of a chunk, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_WIDEST = 16_384
_MANY = 8192
"""Logits that a program holds at once, at most; from how many on it has 16 warps in place of 4."""


@triton.jit
def _entropy(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    logits,
    grad,
    targets,
    weights,
    total,
    nll,
    stride,
    n_words,
    z_loss,
    smoothing,
    NEEDS_GRAD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    grad_row = grad + token * n_words
    weight = tl.load(weights + token)
    if weight == 0:
        tl.store(total + token, 0.0)
        tl.store(nll + token, 0.0)
        if NEEDS_GRAD:
            for start in range(0, n_words, WIDTH):
                words = start + tl.arange(0, WIDTH)
                tl.store(grad_row + words, tl.zeros((WIDTH,), tl.float32), mask=words < n_words)
        return
    target = tl.load(targets + token)
    chosen = tl.load(row + target).to(tl.float32)

    # The running maximum and sum of the softmax (Milakov & Gimelshein, arXiv:1805.02867, algorithm 3).
    largest = tl.full((), -3.0e38, tl.float32)
    sum_exp = tl.zeros((), tl.float32)
    sum_logits = tl.zeros((), tl.float32)
    for start in range(0, n_words, WIDTH):
        words = start + tl.arange(0, WIDTH)
        x = tl.load(row + words, mask=words < n_words, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, axis=0))
        sum_exp = sum_exp * tl.exp(largest - new) + tl.sum(tl.exp(x - new), axis=0)
        largest = new
        if SMOOTHS:
            sum_logits += tl.sum(tl.where(words < n_words, x, 0.0), axis=0)
    log_z = largest + tl.log(sum_exp)

    log_p = chosen - log_z
    penalty = z_loss * log_z * log_z
    if SMOOTHS:
        penalty += smoothing * (log_p - (sum_logits / n_words - log_z))
    tl.store(nll + token, -log_p * weight)
    tl.store(total + token, (penalty - log_p) * weight)

    if NEEDS_GRAD:
        slope = weight * (1 + 2 * z_loss * log_z)
        for start in range(0, n_words, WIDTH):
            words = start + tl.arange(0, WIDTH)
            x = tl.load(row + words, mask=words < n_words, other=-float("inf")).to(tl.float32)
            held = tl.where(words == target, 1 - smoothing, 0.0) + smoothing / n_words
            tl.store(grad_row + words, tl.exp(x - log_z) * slope - held * weight, mask=words < n_words)


@torch.library.custom_op("kajiya::entropy", mutates_args=())
def entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float,
    smoothing: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each token's weighted loss and its −log p alone, float32 [C], and the gradient of the losses' sum, as the logits [C, V].

    `logits` [C, V] in float32, bf16 or fp16, a token's words without gaps; `targets` int64 [C], negative where there is none and
    the weight is 0; `weights` float32 [C]. Only the loss can be differentiated. Without `needs_grad` the gradient is [0, V].
    """
    n_tokens, n_words = logits.shape
    total, nll = (logits.new_empty(n_tokens, dtype=torch.float32) for _ in range(2))
    grad = logits.new_empty(n_tokens if needs_grad else 0, n_words)
    if n_tokens:
        width = min(triton.next_power_of_2(n_words), _WIDEST)
        with torch.cuda.device_of(logits):
            _entropy[(n_tokens,)](
                logits,
                grad,
                targets.contiguous(),
                weights.contiguous(),
                total,
                nll,
                logits.stride(0),
                n_words,
                z_loss,
                smoothing,
                NEEDS_GRAD=needs_grad,
                SMOOTHS=smoothing > 0,
                WIDTH=width,
                num_warps=16 if width >= _MANY else 4,
                enable_fp_fusion=True,
            )
    return total, nll, grad


@entropy.register_fake
def _(
    logits: Any, targets: Any, weights: Any, z_loss: float, smoothing: float, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_tokens, n_words = logits.shape
    total, nll = (logits.new_empty(n_tokens, dtype=torch.float32) for _ in range(2))
    return total, nll, logits.new_empty(n_tokens if needs_grad else 0, n_words)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    _, nll, grad = output
    ctx.mark_non_differentiable(nll, grad)
    ctx.save_for_backward(grad)


def _grads(ctx: Any, grad_total: torch.Tensor, *_rest: Any) -> Any:
    (grad,) = ctx.saved_tensors
    return (grad * grad_total.unsqueeze(1)).to(grad.dtype), None, None, None, None, None


entropy.register_autograd(_grads, setup_context=_keep)
