"""Attention of packed rows on a GPU by torch's kernel for sequences of unequal length, which computes within segments alone.

A mask [B, 1, T, T] in its place grows with the square of the row, and keeps torch from its fastest kernels.

Shape letters: B rows, N query heads, K key heads, T tokens, H head width.
"""

import functools
from typing import Any

import torch
from torch.nn import functional

_WIDTHS = 8
"""Widths of a head are multiples of this …"""
_WIDEST = 256
"""… and at most this."""
_TOLERANCE = 0.03
"""Of numbers about 1 in bf16."""


def takes_bounds(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `by_bounds` takes these heads."""
    width = query.shape[-1]
    fits = width % _WIDTHS == 0 and width <= _WIDEST
    return fits and key.shape == value.shape and query.shape[2:] == key.shape[2:]


def by_bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of query [B, N, T, H] over key and value [B, K, T, H] within segments; returns [B, T, N, H].

    `bounds` are `Layout.bounds`; the last one may stand there more than once. `window`: a token sees so many, itself among them.
    """
    from torch.nn.attention.varlen import varlen_attn

    n_rows, n_heads, n_tokens, _ = query.shape
    n_kv = key.shape[1]
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (each.to(dtype).transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    # No segment is longer than a row: the longest one's length would be another at every batch, for the compiler too.
    result: Any = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        n_tokens,
        n_tokens,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=n_heads != n_kv,
    )
    return result.view(n_rows, n_tokens, n_heads, -1)  # type: ignore[no-any-return]


def filled_up(bounds: torch.Tensor) -> torch.Tensor:
    """The bounds with the last one repeated, up to a power of two: compiled blocks meet few shapes."""
    n = len(bounds)
    return torch.cat([bounds, bounds[-1:].expand(2 ** (n - 1).bit_length() - n)])


@functools.cache
def bounds_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not taken, in words; `None` where it gives what a mask gives, on a few tokens."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "the kernel is one for bf16 and fp16 on a GPU"
    try:
        apart = distance_from_masked(device, dtype)
    except (ImportError, RuntimeError) as problem:
        return f"{problem}".partition("\n")[0] or type(problem).__name__
    return None if apart <= _TOLERANCE else f"the kernel's result is {apart:.2g} apart"


def distance_from_masked(device: torch.device, dtype: torch.dtype) -> float:
    """How far result and gradients are at most from those under a mask, in numbers about 1."""
    segments = (torch.arange(48) >= torch.tensor([[17], [48]])).long().to(device)
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, n, 48, 64, generator=generator).to(device, dtype) for n in (4, 2, 2)]
    weight = torch.randn(2, 48, 4, 64, generator=generator).to(device, dtype)
    bounds = filled_up(torch.tensor([0, 17, 48, 96], dtype=torch.int32, device=device))
    mask = (segments[:, :, None] == segments[:, None, :]).tril().unsqueeze(1)
    found = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for is_masked in (True, False):
            query, key, value = (each.detach().clone().requires_grad_() for each in heads)
            if is_masked:
                result = functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, enable_gqa=True
                ).transpose(1, 2)
            else:
                result = by_bounds(query, key, value, bounds)
            grads = torch.autograd.grad((result * weight).sum(), (query, key, value))
            found.append([result.detach(), *grads])
    scale = [max(1.0, float(each.abs().max())) for each in found[0]]
    masked, bounded = found
    return max(float((a - b).abs().max()) / s for a, b, s in zip(masked, bounded, scale, strict=True))
