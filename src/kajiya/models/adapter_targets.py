"""Which layers of a model an adapter's targets mean: words, or a regular expression."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kajiya.errors import ConfigError
from kajiya.models.tasks import CLASS_HEADS


def target_names(module: nn.Module, targets: str) -> list[str]:
    """Full names of the linear layers that `targets` means. Raises `ConfigError` when there is none."""
    words = {word: _by_name(is_meant) for word, is_meant in _TARGETS.items()}
    return _chosen(module, targets, words, "targets")


def ia3_targets(module: nn.Module, targets: str, option: str) -> list[str]:
    """As `target_names`, for IA³'s option of that name, which knows words of its own besides."""
    words = {word: _by_name(is_meant) for word, is_meant in _TARGETS.items()}
    return _chosen(module, targets, words | {"keys-values": _keys_and_values, "down": _down}, option)


def keeps_transposed(part: nn.Module) -> bool:
    """Whether a linear layer keeps its weights [in, out], as those of GPT-2 do."""
    return type(part).__name__ == "Conv1D"


Pick = Callable[[nn.Module, Mapping[str, nn.Module]], list[str]]
"""Of a model and its linear layers, by their full names, the names of those that a word means."""


def _chosen(module: nn.Module, targets: str, words: Mapping[str, Pick], option: str) -> list[str]:
    from transformers import PreTrainedModel

    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    linear = {
        name: part
        for name, part in module.named_modules()
        if (isinstance(part, nn.Linear) or keeps_transposed(part)) and part is not head and name not in CLASS_HEADS
    }
    if targets in words:
        chosen = words[targets](module, linear)
    else:
        pattern = compiled(targets, f"adapter.options.{option}")
        chosen = [
            name for name, part in module.named_modules() if not list(part.children()) and pattern.fullmatch(name)
        ]
    if not chosen:
        raise ConfigError(
            f"adapter.options.{option}",
            f"{targets!r} matches no module of {type(module).__name__}",
            f"One of {', '.join(words)}, or a regular expression for names like {', '.join([*linear][:2]) or 'none'}.",
        )
    odd = [name for name in chosen if not _has_matrix(module.get_submodule(name))]
    if odd:
        kind = type(module.get_submodule(odd[0])).__name__
        raise ConfigError(
            f"adapter.options.{option}",
            f"{targets!r} matches {odd[0]} ({kind}), which has no matrix of weights to adapt",
            f"Make it match layers alone that have one, like {', '.join([*linear][:2]) or 'none'}.",
        )
    return chosen


def _has_matrix(part: Any) -> bool:
    """Whether a layer has weights of two dimensions or more, also packed ones."""
    weight = part._parameters.get("weight")
    return weight is not None and weight.dim() > 1


def compiled(pattern: str, field: str) -> "re.Pattern[str]":
    """The regular expression. Raises `ConfigError` naming `field` for what is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(field, f"{pattern!r} is no regular expression: {error}") from error


def _by_name(is_meant: Callable[[str], bool]) -> Pick:
    return lambda module, linear: [name for name in linear if is_meant(name)]


def _is_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


_TARGETS: Mapping[str, Callable[[str], bool]] = {
    "all-linear": lambda name: True,
    "attention": _is_attention,
    "mlp": lambda name: not _is_attention(name) and any(part.isdigit() for part in name.split(".")),
}
"""Which linear layers a word means, by their full names (those of a block have its number in them)."""

_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k", "v", "key_proj", "value_proj", "k_lin", "v_lin")
_JOINED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "kv_proj", "kv_b_proj")
"""Last parts of the names of products that give keys and values, by themselves or with the queries."""


def _keys_and_values(module: nn.Module, linear: Mapping[str, nn.Module]) -> list[str]:
    names = [name for name in linear if _is_attention(name)]
    for known in (_KEYS_AND_VALUES, _JOINED):
        if found := [name for name in names if name.rpartition(".")[2] in known]:
            return found
    return []


def _down(module: nn.Module, linear: Mapping[str, nn.Module]) -> list[str]:
    """The products that lead from the inside of a feed-forward block back: as wide as the model behind them, and not before;
    where the inside is as wide as the model, the last of each block."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return []
    width = config.get_text_config().hidden_size
    sizes = {name: _sizes(part) for name, part in linear.items() if _TARGETS["mlp"](name)}
    back = [name for name, (_, n_out) in sizes.items() if n_out == width]
    narrowing = [name for name in back if sizes[name][0] != width]
    return narrowing or list({name.rpartition(".")[0]: name for name in back}.values())


def _sizes(part: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    n_in, n_out = part.weight.shape
    return int(n_in), int(n_out)
