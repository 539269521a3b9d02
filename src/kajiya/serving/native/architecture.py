"""What the C++ decoder must know of a Transformers config, and which ones it computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kajiya.errors import KajiyaError
from kajiya.serving.native import layout

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The modules that each of a layer's four products joins, in order."""
_JOINED_PARTS = {**PARTS, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}
_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}
_RESULT_NORMS = {
    **_NORMS,
    "mlp_norm": "pre_feedforward_layernorm",
    "attention_result_norm": "post_attention_layernorm",
    "mlp_result_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture's layers: RMSNorm, rotary attention (biases and norms of heads allowed), a gate."""

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PARTS)
    norms: Mapping[str, str] = field(default_factory=lambda: _NORMS)
    """The decoder's name of a norm → the module's, where a layer has it."""
    shift: float = 0.0
    """What norms add to their weight."""
    window_of: Literal["config", "layers"] | None = None
    """What says which layers see a window of the text: all of them do where the config has one, or those that it lists."""
    has_own_rotations: bool = False
    """Whether layers that see a window are rotated by other angles than the others."""
    has_scaled_embeddings: bool = False
    gate: str = "hidden_act"
    """The config's name of the gate's function."""
    query_scalar: str | None = None
    """Its name of what scores are divided by the root of; `None`: the width of a head."""
    score_cap: str | None = None
    """Its name of the bound of scores."""
    logit_cap: str | None = None
    """Its name of the bound of logits."""


_LATER_GEMMA: dict[str, Any] = {
    "norms": _RESULT_NORMS,
    "shift": 1.0,
    "window_of": "layers",
    "has_scaled_embeddings": True,
    "gate": "hidden_activation",
    "query_scalar": "query_pre_attn_scalar",
    "logit_cap": "final_logit_softcapping",
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family(window_of="config"),
    "qwen2": Family(window_of="layers"),
    "qwen3": Family(window_of="layers"),
    "phi3": Family(parts=_JOINED_PARTS, window_of="config"),
    "gemma": Family(shift=1.0, has_scaled_embeddings=True),
    "gemma2": Family(**_LATER_GEMMA, score_cap="attn_logit_softcapping"),
    "gemma3_text": Family(**_LATER_GEMMA, has_own_rotations=True),
}
"""By `model_type`: those whose layers the decoder computes."""
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class NotNativeError(KajiyaError):
    """The decoder does not compute this model; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model, under their names in Transformers' configs, and how its layers compute."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    gate: str
    """Its function, as configs name it."""
    attention_scale: float
    """Of scores."""
    embedding_scale: float
    score_cap: float | None
    """Scores stay below it: cap · tanh(score / cap); `None`: they are as they are."""
    logit_cap: float | None
    """The same of logits."""
    windows: tuple[int | None, ...]
    """How many tokens a token sees in each layer, itself included; `None`: all before it."""
    rotations: tuple[str, ...]
    """Whose angles each layer has: the beginning of their names in Transformers' module, empty where all have the same."""


@dataclass(frozen=True)
class Rotary:
    """The angles of rotary attention that do not depend on the length of the text (Su et al. 2021, §3.4.2)."""

    frequencies: torch.Tensor
    """fp32 [H / 2]."""
    scale: float
    """Of cosines and sines."""

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions [1, P] in the dtype of `x`, each [1, P, H], as Transformers' module computes them."""
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(x.dtype), (angles.sin() * self.scale).to(x.dtype)


def architecture_of(config: Any, dtype: torch.dtype) -> Architecture:
    """What the decoder must know of a config whose model is in `dtype`. Raises `NotNativeError`, which says why, unless it
    computes models of it."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotNativeError(f"{config.model_type} is not among {', '.join(FAMILIES)}")
    gate = getattr(config, family.gate)
    if gate not in layout.GATES:
        raise NotNativeError(f"its activation is {gate}, not one of {', '.join(layout.GATES)}")
    values = config.to_dict()
    if values.get("use_bidirectional_attention"):
        raise NotNativeError("its tokens see those behind them")
    n_layers = config.num_hidden_layers
    rotations = [f"{kind}_" for kind in config.layer_types] if family.has_own_rotations else [""] * n_layers
    ropes = config.rope_parameters or {}
    for rotation in dict.fromkeys(rotations):
        rope = (ropes[rotation.removesuffix("_")] if rotation else ropes).get("rope_type", "default")
        if rope not in _FIXED_ROPE:
            raise NotNativeError(f"its positions are scaled by {rope!r}, which depends on the length")
    head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    # Transformers rounds it as the weights are.
    embedding_scale = torch.tensor(config.hidden_size**0.5).to(dtype).item() if family.has_scaled_embeddings else 1.0
    query_scalar = head_dim if family.query_scalar is None else getattr(config, family.query_scalar)
    return Architecture(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        gate=gate,
        attention_scale=query_scalar**-0.5,
        embedding_scale=embedding_scale,
        score_cap=None if family.score_cap is None else getattr(config, family.score_cap),
        logit_cap=None if family.logit_cap is None else getattr(config, family.logit_cap),
        windows=_windows(config, family),
        rotations=tuple(rotations),
    )


def _windows(config: Any, family: Family) -> tuple[int | None, ...]:
    """Of each layer. Raises `NotNativeError` for layers of another kind."""
    kinds = ["full_attention"] * config.num_hidden_layers
    if family.window_of == "layers":
        kinds = config.layer_types
    elif family.window_of == "config" and config.sliding_window is not None:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    unknown = sorted({*kinds} - {"full_attention", "sliding_attention"})
    if unknown:
        raise NotNativeError(f"it has layers of kind {', '.join(unknown)}")
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def cache_bytes(architecture: Architecture, cache: str) -> int:
    """Bytes of one block of the cache, all layers."""
    padded = -(-architecture.head_dim // 16) * 16
    per_head = padded * {"fp32": 4, "bf16": 2, "int8": 1}[cache] + (4 if cache == "int8" else 0)
    return 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * layout.BLOCK_TOKENS * per_head
