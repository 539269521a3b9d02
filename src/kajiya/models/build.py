"""A model from its config: built from scratch, loaded from a folder or the hub, or the user's own module."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from kajiya.config.schema import ModelConfig
from kajiya.config.tables import check_choice, import_target, nearest
from kajiya.errors import ConfigError
from kajiya.models.attention import attention_name
from kajiya.models.load import load_model
from kajiya.models.size import derive_shape

_SIZE_FIELDS = {
    "hidden_size": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
}
"""This project's names and those of Transformers' configs, which are mapped further by each config's `attribute_map`."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of its tokenizer."""

    size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


@dataclass(frozen=True)
class BuiltModel:
    """A model and the values that were derived for it."""

    module: nn.Module
    derived: dict[str, Any]


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """What a model must know of its tokenizer."""
    return Vocabulary(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def build_model(config: ModelConfig, vocabulary: Vocabulary, seed: int) -> BuiltModel:
    """The model in float32 on the CPU, its random weights a function of `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in config.name:
            return _own_module(config)
        if config.path is not None:
            module = load_model(config.path, config.revision, torch.float32, config.attention, config.trust_remote_code)
            rows = module.get_input_embeddings().num_embeddings
            if rows < vocabulary.size:
                raise ConfigError(
                    "model.path", f"{config.path!r} has {rows} embeddings, the tokenizer {vocabulary.size} tokens"
                )
            return BuiltModel(module, {"model.n_params": count_params(module)})
        return _from_scratch(config, vocabulary)


def count_params(module: nn.Module) -> int:
    """Parameters of the module; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _own_module(config: ModelConfig) -> BuiltModel:
    arguments = check_choice("model", config.name, config.options, "model")
    module = import_target(config.name, "model.name")(**arguments)
    if not isinstance(module, nn.Module):
        raise ConfigError("model.name", f"{config.name} returned {type(module).__name__}, not a torch.nn.Module")
    _refuse_hidden_parameters(config.name, module)
    return BuiltModel(module, {"model.n_params": count_params(module)})


def _refuse_hidden_parameters(name: str, module: nn.Module) -> None:
    """Raise `ConfigError` for modules or parameters in a plain list, tuple or dict, which torch neither trains nor saves."""
    known = {id(each) for each in (*module.modules(), *module.parameters())}
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            held = value.values() if isinstance(value, dict) else value
            if any(isinstance(each, (nn.Module, nn.Parameter)) and id(each) not in known for each in held):
                where = f"{path}.{attribute}" if path else attribute
                raise ConfigError(
                    "model.name",
                    f"{name}: its attribute {where!r} is a plain {type(value).__name__} of layers or parameters, which "
                    "would be neither trained nor saved",
                    "Make it an nn.ModuleList, nn.ModuleDict or nn.ParameterList.",
                )


def _from_scratch(config: ModelConfig, vocabulary: Vocabulary) -> BuiltModel:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if config.name not in CONFIG_MAPPING:
        hint = nearest(config.name, CONFIG_MAPPING.keys())
        raise ConfigError(
            "model.name",
            f"{config.name!r} is no architecture that Transformers knows" + (f"; {hint}" if hint else ""),
            "A module of your own is named `package.module:function`.",
        )
    shape = derive_shape(config, vocabulary.size)
    wanted = {_SIZE_FIELDS[name]: value for name, value in asdict(shape).items()} | {
        "head_dim": shape.hidden_size // shape.n_heads,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
    }
    known = _known_fields(CONFIG_MAPPING[config.name]())
    for key in config.options:
        if key not in known:
            hint = nearest(key, known)
            raise ConfigError(
                f"model.options.{key}", f"is no field of the {config.name} config" + (f"; {hint}" if hint else "")
            )
    for ours, theirs in _SIZE_FIELDS.items():
        if getattr(config, ours) is not None and theirs not in known:
            raise ConfigError(f"model.{ours}", f"the {config.name} architecture has no such size")
    fields = {key: value for key, value in wanted.items() if key in known}
    if "rope_theta" not in known and "rope_parameters" in known:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    architecture = AutoConfig.for_model(
        config.name,
        **fields | config.options,
        vocab_size=vocabulary.size,
        bos_token_id=vocabulary.bos_id,
        eos_token_id=vocabulary.eos_id,
        pad_token_id=vocabulary.pad_id,
        tie_word_embeddings=config.tied,
        use_cache=False,
    )
    attention = attention_name(config.attention, architecture)
    module = AutoModelForCausalLM.from_config(architecture, attn_implementation=attention, dtype=torch.float32)
    if config.zero_outputs:
        _zero_outputs(module)
    module.generation_config.eos_token_id = vocabulary.eos_id
    derived = {f"model.{name}": value for name, value in asdict(shape).items() if _SIZE_FIELDS[name] in known}
    if attention == "eager" and config.attention != "eager":
        derived["model.attention"] = "eager"
    return BuiltModel(module, derived | {"model.n_params": count_params(module)})


def _zero_outputs(module: nn.Module) -> None:
    """Zero the matrices that write into the residual stream, by the names that Transformers' families give them."""
    ends = (
        "o_proj.weight",
        "down_proj.weight",
        "out_proj.weight",
        "c_proj.weight",
        "attention.dense.weight",
        "4h_to_h.weight",
    )
    written = [parameter for name, parameter in module.named_parameters() if name.endswith(ends)]
    if not written:
        raise ConfigError("model.zero_outputs", f"{type(module).__name__} has no output matrices of a known name")
    with torch.no_grad():
        for parameter in written:
            parameter.zero_()


def _known_fields(architecture: Any) -> set[str]:
    return set(architecture.to_dict()) | set(architecture.attribute_map)
