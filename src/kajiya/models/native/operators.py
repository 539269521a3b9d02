"""The operators as torch knows them (`torch.ops.kajiya.…`): eager, fake and autograd, each on CPU tensors of float32 or bf16.

Importing this module registers them; the library is built at the first call. Shape letters: B rows, N query heads, K key heads,
T tokens of a row, H width of a head, M tokens flattened, V vocabulary.
"""

import ctypes
from typing import Any

import torch

from kajiya.models.native.library import (
    LANES,
    WIDEST_HEAD,
    Attention,
    Entropy,
    Sums,
    fits,
    heads,
    kind_of,
    load_library,
    operator,
    pointer,
)


def attention_fits(q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor) -> bool:
    """Whether `attention` takes these heads."""
    width = q_BNTH.shape[-1]
    return (
        fits(q_BNTH, k_BKTH, v_BKTH)
        and width % LANES == 0
        and width <= WIDEST_HEAD
        and v_BKTH.shape == k_BKTH.shape
        and q_BNTH.shape[2] == k_BKTH.shape[2]
        and q_BNTH.shape[1] % k_BKTH.shape[1] == 0
        and all(each.stride(-1) == 1 for each in (q_BNTH, k_BKTH, v_BKTH))
    )


def _arguments(q: Any, k: Any, v: Any, first: Any, angles: Any, scale: float, out: Any, log_sums: Any) -> Attention:
    rows, n_heads, tokens, width = q.shape
    cos, sin = angles
    return Attention(
        B=rows,
        N=n_heads,
        K=k.shape[1],
        T=tokens,
        H=width,
        scale=scale,
        first=pointer(first),
        cos=pointer(cos),
        sin=pointer(sin),
        q=heads(q),
        k=heads(k),
        v=heads(v),
        out=heads(out.transpose(1, 2)),
        log_sums=pointer(log_sums),
        n_threads=torch.get_num_threads(),
    )


def _split(qkv_BTAH: torch.Tensor, n_kv: int) -> list[torch.Tensor]:
    """Views of the queries, keys and values [B, n, T, H] in one tensor [B, T, N + 2K, H]."""
    n_q = qkv_BTAH.shape[2] - 2 * n_kv
    return [each.transpose(1, 2) for each in qkv_BTAH.split([n_q, n_kv, n_kv], dim=2)]


def _attend(q: Any, k: Any, v: Any, first: Any, angles: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n_heads, tokens, width = q.shape
    out = q.new_empty(rows, tokens, n_heads, width)
    log_sums = q.new_empty(rows, n_heads, tokens, dtype=torch.float32)
    arguments = _arguments(q, k, v, first, angles, scale, out, log_sums)
    load_library().kajiya_attention_forward(kind_of(q), ctypes.byref(arguments))
    return out, log_sums


def _attend_backward(saved: Any, grad_out: torch.Tensor, angles: Any, scale: float, grads: Any) -> None:
    q, k, v, first, out, log_sums = saved
    arguments = _arguments(q, k, v, first, angles, scale, out, log_sums)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    arguments.grad_out = heads(grad_out.transpose(1, 2))
    arguments.grad_q, arguments.grad_k, arguments.grad_v = (heads(each) for each in grads)
    load_library().kajiya_attention_backward(kind_of(q), ctypes.byref(arguments))


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of q [B, N, T, H] over k, v [B, K, T, H]; query t sees the keys `first`[B, T] (int32) … t.

    Returns the result [B, T, N, H] and the log-sums of the scores, float32 [B, N, T].
    """
    return _attend(q, k, v, first, (None, None), scale)


attention = operator("kajiya::attention")(plain_attention)


@attention.register_fake
def _(q: Any, k: Any, v: Any, first: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n_heads, tokens, width = q.shape
    return q.new_empty(rows, tokens, n_heads, width), q.new_empty(rows, n_heads, tokens, dtype=torch.float32)


def plain_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    log_sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in memory [B, T, n, H]."""
    grads = tuple(each.new_empty(each.transpose(1, 2).shape).transpose(1, 2) for each in (q, k, v))
    _attend_backward((q, k, v, first, out, log_sums), grad_out, (None, None), scale, grads)
    return grads[0], grads[1], grads[2]


attention_backward = operator("kajiya::attention_backward")(plain_attention_backward)


@attention_backward.register_fake
def _(
    grad_out: Any, q: Any, k: Any, v: Any, first: Any, scale: float, out: Any, log_sums: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = [each.new_empty(each.transpose(1, 2).shape).transpose(1, 2) for each in (q, k, v)]
    return made[0], made[1], made[2]


def _keep_attention(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, first, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, first, *output)


def _attention_grads(ctx: Any, grad_out: torch.Tensor, _grad_log_sums: Any) -> Any:
    q, k, v, first, out, log_sums = ctx.saved_tensors
    return (*attention_backward(grad_out, q, k, v, first, ctx.scale, out, log_sums), None, None)


attention.register_autograd(_attention_grads, setup_context=_keep_attention)


def plain_rotary_attention(
    qkv: torch.Tensor, first: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_kv: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, of heads [B, T, N + 2K, H] in one tensor, queries and keys turned by the angles (float32 [B, T, H])."""
    q, k, v = _split(qkv, n_kv)
    return _attend(q, k, v, first, (cos, sin), scale)


rotary_attention = operator("kajiya::rotary_attention")(plain_rotary_attention)


@rotary_attention.register_fake
def _(qkv: Any, first: Any, cos: Any, sin: Any, n_kv: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, n_all, width = qkv.shape
    n_heads = n_all - 2 * n_kv
    return qkv.new_empty(rows, tokens, n_heads, width), qkv.new_empty(rows, n_heads, tokens, dtype=torch.float32)


def plain_rotary_attention_backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    first: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n_kv: int,
    scale: float,
    out: torch.Tensor,
    log_sums: torch.Tensor,
) -> torch.Tensor:
    """The gradient of all heads, as `qkv`."""
    grad = torch.empty_like(qkv)
    saved = (*_split(qkv, n_kv), first, out, log_sums)
    _attend_backward(saved, grad_out, (cos, sin), scale, _split(grad, n_kv))
    return grad


rotary_attention_backward = operator("kajiya::rotary_attention_backward")(plain_rotary_attention_backward)


@rotary_attention_backward.register_fake
def _(
    grad_out: Any, qkv: Any, first: Any, cos: Any, sin: Any, n_kv: int, scale: float, out: Any, log_sums: Any
) -> torch.Tensor:
    return torch.empty_like(qkv)


def _keep_rotary(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, first, cos, sin, ctx.n_kv, ctx.scale = inputs
    ctx.save_for_backward(qkv, first, cos, sin, *output)


def _rotary_grads(ctx: Any, grad_out: torch.Tensor, _grad_log_sums: Any) -> Any:
    qkv, first, cos, sin, out, log_sums = ctx.saved_tensors
    grad = rotary_attention_backward(grad_out, qkv, first, cos, sin, ctx.n_kv, ctx.scale, out, log_sums)
    return grad, None, None, None, None, None


rotary_attention.register_autograd(_rotary_grads, setup_context=_keep_rotary)


def entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float,
    smoothing: float,
    *,
    needs_grad: bool,
) -> tuple[float, float]:
    """Σ weight · (−log p(target)), and what z-loss and smoothing add; contiguous logits [M, V] become the gradient of their sum.

    `targets` int64 [M], `weights` float32 [M]. A plain function and no operator of torch's: the loss calls it within a forward
    pass of its own, where it needs neither autograd nor tracing.
    """
    sums = (ctypes.c_double * 2)()
    arguments = Entropy(
        N=logits.shape[0],
        V=logits.shape[1],
        targets=pointer(targets),
        weights=pointer(weights),
        z_loss=z_loss,
        smoothing=smoothing,
        sums=sums,
        n_threads=torch.get_num_threads(),
    )
    load_library().kajiya_entropy(kind_of(logits), ctypes.byref(arguments), pointer(logits), int(needs_grad))
    return sums[0], sums[1]


def softmax_sums_(logits_vn: torch.Tensor, largest_n: torch.Tensor, total_n: torch.Tensor) -> None:
    """One more block of the vocabulary: the largest logit of each token so far, and Σ exp(logit − largest), both in place.

    Contiguous logits [v, n], words first, n a multiple of `LANES`; `largest_n` float32, −∞ before the first block, `total_n`
    float64. No operator of torch's, as `entropy_`.
    """
    n_words, n = logits_vn.shape
    arguments = Sums(
        V=n_words, N=n, largest=pointer(largest_n), total=pointer(total_n), n_threads=torch.get_num_threads()
    )
    load_library().kajiya_softmax_sums(kind_of(logits_vn), ctypes.byref(arguments), pointer(logits_vn))
