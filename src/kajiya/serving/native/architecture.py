"""What the C++ decoder must know of a Transformers config, and which ones it computes."""

from dataclasses import dataclass
from typing import Any

import torch

from kajiya.errors import KajiyaError
from kajiya.serving.native import layout

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s whose layers the decoder computes: RMSNorm, rotary attention (biases and norms of queries and keys
allowed), SwiGLU."""
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class NotNativeError(KajiyaError):
    """The decoder does not compute this model; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model, under their names in Transformers' configs."""

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


def architecture_of(config: Any) -> Architecture:
    """The sizes in a config. Raises `NotNativeError`, which says why, unless the decoder computes models of it."""
    if config.model_type not in ARCHITECTURES:
        raise NotNativeError(f"{config.model_type} is not among {', '.join(ARCHITECTURES)}")
    if config.hidden_act not in ("silu", "swish"):
        raise NotNativeError(f"its activation is {config.hidden_act}, not silu")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _FIXED_ROPE:
        raise NotNativeError(f"its positions are scaled by {rope!r}, which depends on the length")
    return Architecture(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=bool(config.tie_word_embeddings),
    )


def cache_bytes(architecture: Architecture, cache: str) -> int:
    """Bytes of one block of the cache, all layers."""
    padded = -(-architecture.head_dim // 16) * 16
    per_head = padded * {"fp32": 4, "bf16": 2, "int8": 1}[cache] + (4 if cache == "int8" else 0)
    return 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * layout.BLOCK_TOKENS * per_head
