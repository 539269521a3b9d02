"""Decoder blocks whose products are joined and whose rest runs in C++ operators, forward and backward.

A block of the Llama family is a chain of four functions: norm and the product with q, k and v at once; rotary attention; norm and
the product with gate and up at once; SwiGLU and the product with down. Each keeps its own input for the backward pass and makes
norms and gates again there. The parameters stay those of Transformers, under their own names: joined matrices are laid one
behind the other in memory. A block that does not fit, and a call that these functions do not know (a cache, autocast), goes
through Transformers' own code.

Shape letters: B rows, T tokens of a row, M = B · T tokens flattened, D hidden width, F width of the gate, H width of a head.
"""

import types
from functools import partial
from typing import Any

import torch
from torch import nn

from kajiya.models.attention import PACKED_SDPA
from kajiya.models.fused_lora import adapted_product, parts_of
from kajiya.models.fused_products import NormProduct, SwigluProduct, whole
from kajiya.models.native.library import LANES, WIDEST_HEAD, native_problem
from kajiya.models.quantized import is_quantized

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm")
"""Decoder layers that are this chain where they have no bias; each is compared with Transformers' code before it is taken."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest difference of a block's result from Transformers', over the largest value of the result."""


def fuse_blocks(model: nn.Module, weights: torch.dtype, device: torch.device, *, is_autocast: bool) -> str:
    """Put the joined form in place of the model's blocks where it fits; returns what was done and why, in words."""
    if device.type != "cpu":
        return "no: the operators are for a CPU"
    if is_autocast or weights not in _TOLERANCE:
        return "no: not in this precision"
    layers = [module for module in model.modules() if type(module).__name__ in _LAYERS]
    if not layers:
        return f"no: {type(model).__name__} is no architecture that they are known of"
    problem = native_problem() or _misfit(layers[0])
    if problem is not None:
        return f"no: {problem}"
    import kajiya.models.native.operators  # noqa: F401 (registers them)

    for layer in layers:
        _join(layer)
    if not _agrees(layers[0], weights):
        return f"no: the joined form of {type(layers[0]).__name__} gives another result than Transformers' code"
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    for norm in [module for module in model.modules() if type(module).__name__ in _NORMS]:
        norm.forward = types.MethodType(_normed, norm)  # type: ignore[method-assign]
    return f"yes: {len(layers)} blocks"


def is_fused(model: nn.Module) -> bool:
    """Whether the model's blocks have the joined form."""
    return _joined_block(model) is not None


def can_make_some_states(model: nn.Module) -> bool:
    """Whether the blocks take `read_places`: they are joined, and no compiler would build them anew for each number of places."""
    block = _joined_block(model)
    return block is not None and block._compiled_call_impl is None


def _joined_block(model: nn.Module) -> nn.Module | None:
    """One of the model's joined blocks, which are all of them or none."""
    layers = (module for module in model.modules() if type(module).__name__ in _LAYERS)
    return next((layer for layer in layers if layer.forward == types.MethodType(_forward, layer)), None)


def _misfit(layer: Any) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.head_dim
    if attention.config._attn_implementation != PACKED_SDPA:
        return f"attention is {attention.config._attn_implementation}"
    if width % (2 * LANES) or width > WIDEST_HEAD:
        return f"heads of width {width}; multiples of {2 * LANES} up to {WIDEST_HEAD} fit"
    if not all(type(norm).__name__ in _NORMS for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        return "its norms are adapted"
    if attention.attention_dropout:
        return "attention has dropout"
    if getattr(attention.config, "sliding_window", None) is not None:
        return "attention has a sliding window"
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the gate's function is {type(mlp.act_fn).__name__}"
    linears = [*_projections(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if any(_are_plain(_inner(each)) and is_quantized(_inner(each).weight) for each in linears):
        return "torchao's weights are no matrices that could be joined"
    if any(_inner(each).bias is not None for each in linears):
        return "its products have a bias"
    if any(_inner(each).out_features % LANES or _inner(each).in_features % LANES for each in linears):
        return f"widths are no multiples of {LANES}"
    return None


def _inner(linear: Any) -> Any:
    """The product within an adapter's layer, or itself."""
    return linear.base_layer if hasattr(linear, "base_layer") else linear  # PEFT's own name for it


def _projections(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _are_plain(*linears: Any) -> bool:
    """Whether these are bare matrices, without an adapter around them."""
    return all(type(each) is nn.Linear for each in linears)


def _join(layer: Any) -> None:
    """Lay the matrices that share an input one behind the other in memory."""
    for group in (_projections(layer.self_attn), [layer.mlp.gate_proj, layer.mlp.up_proj]):
        matrices = [_inner(linear) for linear in group]
        if not _are_plain(*matrices):
            continue
        weights = [matrix.weight for matrix in matrices]
        joined = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
            weight.data = part


def _products(x_MD: torch.Tensor, norm: Any, linears: list[Any]) -> torch.Tensor:
    """The products of the normed x with all of the linears, side by side."""
    eps = norm.variance_epsilon
    if _are_plain(*linears):
        product: torch.Tensor = NormProduct.apply(x_MD, norm.weight, eps, *(linear.weight for linear in linears))
        return product
    normed, _ = torch.ops.kajiya.rms_norm(x_MD, norm.weight, eps)
    return _adapted(normed, linears)


def _product(x_MD: torch.Tensor, linear: Any) -> torch.Tensor:
    return linear(x_MD) if _are_plain(linear) else _adapted(x_MD, [linear])


def _adapted(x_MD: torch.Tensor, linears: list[Any]) -> torch.Tensor:
    """The products of x with linears that have adapters, side by side; of a kind that is not known, each by its own code."""
    parts = [each for linear in linears if (each := parts_of(linear)) is not None]
    if len(parts) < len(linears) or parts[0].weight.dtype != x_MD.dtype:
        return torch.cat([linear(x_MD) for linear in linears], dim=-1)
    return adapted_product(x_MD, whole(tuple(part.weight for part in parts)), parts)


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
    places = read_places if _is_last(layer) else None
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
    y, _ = torch.ops.kajiya.rms_norm(hidden_states.reshape(-1, len(norm.weight)), norm.weight, norm.variance_epsilon)
    normed: torch.Tensor = y.view(hidden_states.shape)
    return normed


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
    first_BT = _first_keys(first, n_rows, n_tokens)
    if places is None:
        heads = _products(x_MD, layer.input_layernorm, _projections(attention))
    else:
        keys_values = _products(x_MD, layer.input_layernorm, _projections(attention)[1:])
        first_BT = _seeing_less(first_BT, places)
        x_MD = x_MD.index_select(0, places)
        queries = _products(x_MD, layer.input_layernorm, [attention.q_proj])
        placed = queries.new_zeros(len(keys_values), queries.shape[1]).index_copy(0, places, queries)
        heads = torch.cat([placed, keys_values], dim=1)
    heads_BTAH = heads.view(n_rows, n_tokens, -1, attention.head_dim)
    n_kv = (heads_BTAH.shape[2] * attention.head_dim - _inner(attention.o_proj).in_features) // (2 * attention.head_dim)
    cos, sin = (each.float().expand(n_rows, -1, -1).contiguous() for each in angles)
    attended, _ = torch.ops.kajiya.rotary_attention(heads_BTAH, first_BT, cos, sin, n_kv, attention.scaling)
    attended = attended.view(n_rows * n_tokens, -1)
    if places is not None:
        attended = attended.index_select(0, places)
    x_MD = x_MD + _product(attended, attention.o_proj)
    both_MF = _products(x_MD, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    if _are_plain(mlp.down_proj):
        written = SwigluProduct.apply(both_MF, mlp.down_proj.weight)
    else:
        written = _product(torch.ops.kajiya.swiglu(both_MF), mlp.down_proj)
    result: torch.Tensor = (x_MD + written).view(hidden_BTD.shape if places is None else (1, len(places), width))
    return result


def _first_keys(first: torch.Tensor | None, n_rows: int, n_tokens: int) -> torch.Tensor:
    """Each token's first key, int32 [B, T], from what stands for the mask."""
    return torch.zeros(n_rows, n_tokens, dtype=torch.int32) if first is None else first.reshape(n_rows, n_tokens)


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
        x = torch.randn(1, 24, _inner(attention.q_proj).in_features).to(dtype)
        angle = torch.rand(1, 24, attention.head_dim // 2).repeat(1, 1, 2) * 6
        angles = (angle.cos().to(dtype), angle.sin().to(dtype))
        mask = (torch.arange(24, dtype=torch.int32) // 10 * 10).view(1, 1, 1, 24)
        ours = _chain(layer, x, mask, angles).float()
        theirs = type(layer).forward(layer, x, attention_mask=mask, position_embeddings=angles).float()
    for module, is_training in modes:
        module.training = is_training
    difference: float = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return difference <= _TOLERANCE[dtype]
