"""Which layers of a model an adapter's targets mean: words, or a regular expression."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kajiya.errors import ConfigError
from kajiya.models.tasks import CLASS_HEADS


@dataclass(frozen=True)
class Targets:
    """What of a model an adapter of low-rank matrices changes, by full names."""

    modules: list[str]
    """Linear layers."""
    parameters: list[str]
    """Tensors that PEFT changes by their own names (its `target_parameters`): experts, and the linear layers that it would take
    for such."""


def lora_targets(module: nn.Module, targets: str) -> Targets:
    """The linear layers and the experts that `targets` means. Raises `ConfigError` when there is none."""
    experts = expert_names(module)
    chosen = _chosen(module, targets, _WORDS, "targets", experts)
    modules = [name for name in chosen if name not in experts]
    renamed = _taken_for_experts(module, {name.rpartition(".")[2] for name in modules})
    by_weight = [name for name in modules if name.rpartition(".")[2] in renamed]
    return Targets(
        [name for name in modules if name not in by_weight],
        [name for name in chosen if name in experts] + [f"{name}.weight" for name in by_weight],
    )


def ia3_targets(module: nn.Module, targets: str, option: str) -> list[str]:
    """Full names of the linear layers that IA³'s option of that name means; it knows words of its own besides."""
    own: dict[str, Pick] = {"keys-values": _keys_and_values, "down": _down}
    return _chosen(module, targets, {word: pick for word, pick in _WORDS.items() if word != "experts"} | own, option)


def expert_names(module: nn.Module) -> list[str]:
    """Full names of the tensors [expert, out, in] of a mixture, which Transformers keeps so and not as linear layers.

    They lie in something that is called experts, by its place or by its class; other tensors may have three axes too (XLNet).
    """
    return [
        f"{path}.{own}" if path else own
        for path, part in module.named_modules()
        for own, each in part.named_parameters(recurse=False)
        if each.ndim == 3 and len(each) > 1 and "expert" in f"{path}.{own} {type(part).__name__}".lower()
    ]


def _taken_for_experts(module: nn.Module, last_parts: set[str]) -> set[str]:
    """Last parts of names that PEFT takes for those which a mixture's experts had before Transformers 5, whatever they stand for
    now (a dense layer, the expert that all tokens share): a target of that name would adapt the experts instead.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = set()
    for part in last_parts:
        probe = LoraConfig(target_modules=[part])
        try:
            convert_peft_config_for_transformers(probe, module, None)
        except ValueError:  # one of several that have become one tensor
            taken.add(part)
        if part not in (probe.target_modules or ()):
            taken.add(part)
    return taken


def keeps_transposed(part: nn.Module) -> bool:
    """Whether a linear layer keeps its weights [in, out], as those of GPT-2 do."""
    return type(part).__name__ == "Conv1D"


Pick = Callable[[nn.Module, Sequence[str], Mapping[str, nn.Module]], list[str]]
"""Of a model, the names that there are to choose from, and its linear layers by name: the names that a word means."""


def _chosen(
    module: nn.Module, targets: str, words: Mapping[str, Pick], option: str, experts: Sequence[str] = ()
) -> list[str]:
    """Full names of linear layers, and of those of the `experts`, that the words between commas mean, or the pattern."""
    from transformers import PreTrainedModel

    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    linear = {
        name: part
        for name, part in module.named_modules()
        if (isinstance(part, nn.Linear) or keeps_transposed(part)) and part is not head and name not in CLASS_HEADS
    }
    said = [word.strip() for word in targets.split(",")]
    if all(word in words for word in said):
        found = {name for word in said for name in words[word](module, [*linear, *experts], linear)}
        chosen = [name for name in (*linear, *experts) if name in found]
    else:
        pattern = compiled(targets, f"adapter.options.{option}")
        leaves = [name for name, part in module.named_modules() if not list(part.children())]
        chosen = [name for name in (*leaves, *experts) if pattern.fullmatch(name)]
    if not chosen and option == "feedforward" and expert_names(module):
        raise ConfigError(
            f"adapter.options.{option}",
            f"{targets!r} matches no module of {type(module).__name__}, whose feed-forward blocks are experts: IA³ has no "
            "factors for these",
            "Set adapter.options.feedforward=null, or adapter.name=lora.",
        )
    if not chosen:
        names = ", ".join([*experts[:1], *linear][:2]) or "none"
        raise ConfigError(
            f"adapter.options.{option}",
            f"{targets!r} matches no module of {type(module).__name__}",
            f"One of {', '.join(words)}, several with commas between them, or a regular expression for names like {names}.",
        )
    odd = [name for name in chosen if name not in experts and not _has_matrix(module.get_submodule(name))]
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
    return lambda module, names, linear: [name for name in names if is_meant(name)]


def _is_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _is_mlp(name: str) -> bool:
    return not _is_attention(name) and any(part.isdigit() for part in name.split("."))


def _experts(module: nn.Module, names: Sequence[str], linear: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in names if name not in linear or "experts" in name.split(".")]


_WORDS: Mapping[str, Pick] = {
    "all-linear": _by_name(lambda name: True),
    "attention": _by_name(_is_attention),
    "mlp": _by_name(_is_mlp),
    "experts": _experts,
}
"""Which linear layers and experts a word means, by their full names (those of a block have its number in them)."""

_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k", "v", "key_proj", "value_proj", "k_lin", "v_lin")
_JOINED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "kv_proj", "kv_b_proj")
"""Last parts of the names of products that give keys and values, by themselves or with the queries."""


def _keys_and_values(module: nn.Module, _: Sequence[str], linear: Mapping[str, nn.Module]) -> list[str]:
    names = [name for name in linear if _is_attention(name)]
    for known in (_KEYS_AND_VALUES, _JOINED):
        if found := [name for name in names if name.rpartition(".")[2] in known]:
            return found
    return []


def _down(module: nn.Module, _: Sequence[str], linear: Mapping[str, nn.Module]) -> list[str]:
    """The products that lead from the inside of a feed-forward block back: as wide as the model behind them, and not before;
    where the inside is as wide as the model, the last of each block."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return []
    width = config.get_text_config().hidden_size
    sizes = {name: _sizes(part) for name, part in linear.items() if _is_mlp(name)}
    back = [name for name, (_, n_out) in sizes.items() if n_out == width]
    narrowing = [name for name in back if sizes[name][0] != width]
    return narrowing or list({name.rpartition(".")[0]: name for name in back}.values())


def _sizes(part: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    n_in, n_out = part.weight.shape
    return int(n_in), int(n_out)
