"""Architectures whose decoder blocks can be joined, and what distinguishes them; which blocks fit, and why others do not.

A block norms what it reads, multiplies it with q, k and v, perhaps norms the heads, turns and attends, multiplies with o; then it
norms, multiplies with gate and up, gates, multiplies with down. Gemma 3 norms both results again before they are added.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kajiya.models.attention import PACKED_SDPA
from kajiya.models.fused_products import rms_normed
from kajiya.models.native.library import LANES, WIDEST_HEAD
from kajiya.models.quantized import is_quantized


@dataclass(frozen=True)
class Family:
    """One architecture's block."""

    norm: str
    """Class of its norms."""
    eps: str = "variance_epsilon"
    """Their attribute that is added to the mean of squares."""
    shift: float = 0.0
    """What they add to their weight."""
    has_head_norms: bool = False
    has_result_norms: bool = False
    window_of: Literal["config", "attention"] | None = None
    """What says how far back a token sees, where one does."""


FAMILIES = {
    "LlamaDecoderLayer": Family("LlamaRMSNorm"),
    "MistralDecoderLayer": Family("MistralRMSNorm", window_of="config"),
    "Qwen2DecoderLayer": Family("Qwen2RMSNorm", window_of="attention"),
    "Qwen3DecoderLayer": Family("Qwen3RMSNorm", has_head_norms=True, window_of="attention"),
    "GemmaDecoderLayer": Family("GemmaRMSNorm", eps="eps", shift=1.0),
    "Gemma3DecoderLayer": Family(
        "Gemma3RMSNorm", eps="eps", shift=1.0, has_head_norms=True, has_result_norms=True, window_of="attention"
    ),
}
"""By the class of the decoder layer; each is compared with Transformers' code before it is taken."""
NORMS = {family.norm: family for family in FAMILIES.values()}
GATES = {"SiLU": 0, "SiLUActivation": 0, "GELUTanh": 1}
"""The C++ operators' number of a gate, by the class of its function."""


def family_of(layer: nn.Module) -> Family:
    """What distinguishes the layer's architecture."""
    return FAMILIES[type(layer).__name__]


def norm_numbers(norm: Any) -> tuple[float, float]:
    """What a norm adds to the mean of squares, and to its weight."""
    family = NORMS[type(norm).__name__]
    return getattr(norm, family.eps), family.shift


def window(layer: Any) -> int | None:
    """How many tokens a token sees, itself included; `None`: all before it."""
    attention = layer.self_attn
    holders = {"config": attention.config, "attention": attention}
    named = family_of(layer).window_of
    found: int | None = None if named is None else holders[named].sliding_window
    return found


def norms_between(layer: Any) -> tuple[Any, Any | None, Any | None]:
    """The norm before the gate; those of the results of attention and of the gate, where there are any."""
    if family_of(layer).has_result_norms:
        return layer.pre_feedforward_layernorm, layer.post_attention_layernorm, layer.post_feedforward_layernorm
    return layer.post_attention_layernorm, None, None


def projections(attention: Any) -> list[Any]:
    """The products whose results are the heads."""
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def inner(linear: Any) -> Any:
    """The product within an adapter's layer, or itself."""
    return linear.base_layer if hasattr(linear, "base_layer") else linear  # PEFT's own name for it


def are_plain(*linears: Any) -> bool:
    """Whether these are bare matrices, without an adapter around them."""
    return all(type(each) is nn.Linear for each in linears)


def misfit(layer: Any) -> str | None:
    """Why the block cannot be joined, in words; `None` when it can."""
    attention, mlp, family = layer.self_attn, layer.mlp, family_of(layer)
    width = attention.head_dim
    if attention.config._attn_implementation != PACKED_SDPA:
        return f"attention is {attention.config._attn_implementation}"
    if width % (2 * LANES) or width > WIDEST_HEAD:
        return f"heads of width {width}; multiples of {2 * LANES} up to {WIDEST_HEAD} fit"
    norms = [layer.input_layernorm, *(each for each in norms_between(layer) if each is not None)]
    if family.has_head_norms:
        norms += [attention.q_norm, attention.k_norm]
    if not all(type(norm).__name__ == family.norm for norm in norms):
        return "its norms are adapted"
    if attention.attention_dropout:
        return "attention has dropout"
    if not attention.is_causal:
        return "attention looks ahead"
    if type(mlp.act_fn).__name__ not in GATES:
        return f"the gate's function is {type(mlp.act_fn).__name__}"
    linears = [*projections(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if any(are_plain(inner(each)) and is_quantized(inner(each).weight) for each in linears):
        return "torchao's weights are no matrices that could be joined"
    if any(inner(each).out_features % LANES or inner(each).in_features % LANES for each in linears):
        return f"widths are no multiples of {LANES}"
    return None


def rms(x_MD: torch.Tensor, norm: Any) -> torch.Tensor:
    """The norm's result."""
    return rms_normed(x_MD, norm.weight, *norm_numbers(norm))
