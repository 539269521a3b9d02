"""Decoder blocks whose products are joined and whose rest runs in C++ operators, forward and backward.

A block is a chain of four functions: norm and the product with q, k and v at once; rotary attention; norm and the product with gate
and up at once; the gate and the product with down. Each keeps its own input for the backward pass, and gates are made again
there. `fused_families` says which architectures have this chain, and what some have besides. The parameters stay those of
Transformers, under their own names: joined matrices are laid one behind the other in memory. A block that does not fit, and a
call that these functions do not know (a cache, autocast), goes through Transformers' own code.

Shape letters: B rows, T tokens of a row, M = B · T tokens flattened, D hidden width, F width of the gate, H width of a head.
"""

import types
from functools import partial
from typing import Any

import torch
from torch import nn

from kajiya.models.attention import window_starts
from kajiya.models.fused_families import (
    FAMILIES,
    GATES,
    NORMS,
    are_plain,
    family_of,
    inner,
    misfit,
    norm_numbers,
    norms_between,
    projections,
    rms,
    window,
)
from kajiya.models.fused_lora import adapted_product, parts_of
from kajiya.models.fused_products import GatedProduct, NormProduct, gated, rotary_attention, whole
from kajiya.models.native.library import native_problem

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest difference of a block's result from Transformers', over the largest value of the result."""


def fuse_blocks(model: nn.Module, weights: torch.dtype, device: torch.device, *, is_autocast: bool) -> str:
    """Put the joined form in place of the model's blocks where it fits; returns what was done and why, in words."""
    if device.type != "cpu":
        return "no: the operators are for a CPU"
    if is_autocast or weights not in _TOLERANCE:
        return "no: not in this precision"
    layers = [module for module in model.modules() if type(module).__name__ in FAMILIES]
    if not layers:
        return f"no: {type(model).__name__} is no architecture that they are known of"
    problem = native_problem() or next(filter(None, map(misfit, layers)), None)
    if problem is not None:
        return f"no: {problem}"
    import kajiya.models.native.operators
    import kajiya.models.native.pointwise  # noqa: F401 (both register them)

    for layer in layers:
        _join(layer)
    # Layers of one window are alike.
    if not all(_agrees(layer, weights) for layer in {window(layer): layer for layer in layers}.values()):
        return f"no: the joined form of {type(layers[0]).__name__} gives another result than Transformers' code"
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    for norm in [module for module in model.modules() if type(module).__name__ in NORMS]:
        norm.forward = types.MethodType(_normed, norm)  # type: ignore[method-assign]
    return f"yes: {len(layers)} blocks"


def is_fused(model: nn.Module) -> bool:
    """Whether the model's blocks have the joined form, all of them or none; such blocks take `read_places`."""
    layers = (module for module in model.modules() if type(module).__name__ in FAMILIES)
    return any(layer.forward == types.MethodType(_forward, layer) for layer in layers)


def _join(layer: Any) -> None:
    """Lay the matrices that share an input one behind the other in memory."""
    for group in (projections(layer.self_attn), [layer.mlp.gate_proj, layer.mlp.up_proj]):
        matrices = [inner(linear) for linear in group]
        if not are_plain(*matrices):
            continue
        weights = [matrix.weight for matrix in matrices]
        joined = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
            weight.data = part


def _products(x_MD: torch.Tensor, norm: Any, linears: list[Any]) -> torch.Tensor:
    """The products of the normed x with all of the linears, side by side."""
    if not are_plain(*linears):
        return _adapted(rms(x_MD, norm), linears)
    product = NormProduct.apply(x_MD, norm.weight, *norm_numbers(norm), *(linear.weight for linear in linears))
    return _with_biases(product, linears)


def _with_biases(product_MO: torch.Tensor, linears: list[Any]) -> torch.Tensor:
    """The products plus the biases of those that have one. Not in place: selective checkpointing keeps the product."""
    if all(linear.bias is None for linear in linears):
        return product_MO
    parts = [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
    return product_MO + torch.cat(parts)


def _product(x_MD: torch.Tensor, linear: Any) -> torch.Tensor:
    return linear(x_MD) if are_plain(linear) else _adapted(x_MD, [linear])


def _adapted(x_MD: torch.Tensor, linears: list[Any]) -> torch.Tensor:
    """The products of x with linears that have adapters, side by side; of a kind that is not known, each by its own code."""
    parts = [each for linear in linears if (each := parts_of(linear)) is not None]
    if len(parts) < len(linears) or parts[0].weight.dtype != x_MD.dtype:
        return torch.cat([linear(x_MD) for linear in linears], dim=-1)
    product = adapted_product(x_MD, whole(tuple(part.weight for part in parts)), parts)
    return _with_biases(product, [inner(linear) for linear in linears])


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: Any = None,
    read_places: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The layer's forward pass. `attention_mask` is `None`, or each token's first key, int32 [B, 1, 1, T].

    Every layer is told the places (of M, ascending) whose last states are read; the last one gives these alone, [1, n, D].
    """
    places = read_places if read_places is not None and _is_last(layer) else None
    is_known = attention_mask is None or attention_mask.dtype == torch.int32
    # Transformers renamed the cache within version 5.
    has_cache = any(
        kwargs.get(name) is not None for name in ("cache", "past_key_values")
    )  # absent in the other's calls
    if not is_known or has_cache or position_embeddings is None or not _fits(layer.input_layernorm, hidden_states):
        result: torch.Tensor = type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return result if places is None else result.flatten(0, 1).index_select(0, places)[None]
    chain = partial(_chain, layer, first=attention_mask, angles=position_embeddings, places=places)
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled() and not _call_checkpoints():
        made_again: torch.Tensor = layer._gradient_checkpointing_func(chain, hidden_states)
        return made_again
    return chain(hidden_states)


def _call_checkpoints() -> bool:
    """Whether Transformers' layers checkpoint their call, as they did before they checkpointed `forward`, which ours replaces."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def _is_last(layer: Any) -> bool:
    return bool(layer.self_attn.layer_idx + 1 == layer.self_attn.config.num_hidden_layers)


def _normed(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A norm by itself: the last one, and those of a block that is called in another way."""
    if not _fits(norm, hidden_states):
        return type(norm).forward(norm, hidden_states)  # type: ignore[no-any-return]
    return rms(hidden_states.reshape(-1, len(norm.weight)), norm).view(hidden_states.shape)


def _fits(norm: Any, hidden: torch.Tensor) -> bool:
    return hidden.device.type == "cpu" and hidden.dtype == norm.weight.dtype and not torch.is_autocast_enabled("cpu")


def _chain(
    layer: Any,
    hidden_BTD: torch.Tensor,
    first: torch.Tensor | None,
    angles: Any,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """The block's result [B, T, D]; with `places`, of these alone, [1, n, D]: the others give their keys and values to it."""
    attention, mlp = layer.self_attn, layer.mlp
    n_rows, n_tokens, width = hidden_BTD.shape
    x_MD = hidden_BTD.reshape(-1, width)
    first_BT = _first_keys(first, n_rows, n_tokens, window(layer))
    if places is None:
        heads = _products(x_MD, layer.input_layernorm, projections(attention))
    else:
        keys_values = _products(x_MD, layer.input_layernorm, projections(attention)[1:])
        first_BT = _seeing_less(first_BT, places)
        x_MD = x_MD.index_select(0, places)
        queries = _products(x_MD, layer.input_layernorm, [attention.q_proj])
        placed = queries.new_zeros(len(keys_values), queries.shape[1]).index_copy(0, places, queries)
        heads = torch.cat([placed, keys_values], dim=1)
    heads_BTAH = heads.view(n_rows, n_tokens, -1, attention.head_dim)
    n_kv = (heads_BTAH.shape[2] * attention.head_dim - inner(attention.o_proj).in_features) // (2 * attention.head_dim)
    if family_of(layer).has_head_norms:
        heads_BTAH = _normed_heads(attention, heads_BTAH, n_kv)
    cos, sin = (each.float().expand(n_rows, -1, -1).contiguous() for each in angles)
    attended = rotary_attention(heads_BTAH, first_BT, cos, sin, n_kv, attention.scaling)
    attended = attended.view(n_rows * n_tokens, -1)
    if places is not None:
        attended = attended.index_select(0, places)
    before_gate, after_attention, after_gate = norms_between(layer)
    attended = _product(attended, attention.o_proj)
    x_MD = x_MD + (attended if after_attention is None else rms(attended, after_attention))
    both_MF, gate = _products(x_MD, before_gate, [mlp.gate_proj, mlp.up_proj]), GATES[type(mlp.act_fn).__name__]
    if are_plain(mlp.down_proj):
        written = _with_biases(GatedProduct.apply(both_MF, gate, mlp.down_proj.weight), [mlp.down_proj])
    else:
        written = _product(gated(both_MF, gate), mlp.down_proj)
    if after_gate is not None:
        written = rms(written, after_gate)
    result: torch.Tensor = (x_MD + written).view(hidden_BTD.shape if places is None else (1, len(places), width))
    return result


def _normed_heads(attention: Any, heads_BTAH: torch.Tensor, n_kv: int) -> torch.Tensor:
    """The heads, queries and keys normed."""
    q_norm, k_norm = attention.q_norm, attention.k_norm
    weights = torch.stack([q_norm.weight, k_norm.weight])
    normed, _ = torch.ops.kajiya.head_norms(heads_BTAH.flatten(0, 1), weights, n_kv, *norm_numbers(q_norm))
    result: torch.Tensor = normed.view(heads_BTAH.shape)
    return result


def _first_keys(first: torch.Tensor | None, n_rows: int, n_tokens: int, window: int | None) -> torch.Tensor:
    """Each token's first key, int32 [B, T], from what stands for the mask, no further back than the window."""
    seen = torch.zeros(n_rows, n_tokens, dtype=torch.int32) if first is None else first.reshape(n_rows, n_tokens)
    return seen if window is None or window >= n_tokens else seen.maximum(window_starts(seen, window))


def _seeing_less(first_BT: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The first keys where only `places` are read: another token sees itself alone, which costs the least."""
    own = torch.arange(first_BT.shape[1], dtype=torch.int32).repeat(len(first_BT))
    return own.index_copy(0, places, first_BT.flatten()[places]).view(first_BT.shape)


def _agrees(layer: Any, dtype: torch.dtype) -> bool:
    """Whether the joined form gives what Transformers' code gives, on a few tokens; adapters' dropout is off for it."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    attention = layer.self_attn
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = torch.randn(1, 24, inner(attention.q_proj).in_features).to(dtype)
        angle = torch.rand(1, 24, attention.head_dim // 2).repeat(1, 1, 2) * 6
        angles = (angle.cos().to(dtype), angle.sin().to(dtype))
        mask = (torch.arange(24, dtype=torch.int32) // 10 * 10).view(1, 1, 1, 24)
        ours = _chain(layer, x, mask, angles).float()
        theirs = type(layer).forward(layer, x, attention_mask=mask, position_embeddings=angles).float()
    for module, is_training in modes:
        module.training = is_training
    difference: float = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return difference <= _TOLERANCE[dtype]
