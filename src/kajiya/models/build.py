"""A model from its config: built from scratch, loaded from a folder or the hub, or the user's own module."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.config.quantities import parse_count
from kajiya.config.schema import ModelConfig
from kajiya.config.tables import check_choice, import_target, nearest
from kajiya.errors import ConfigError
from kajiya.models.adapter_files import is_adapter
from kajiya.models.attention import attention_name
from kajiya.models.load import load_model
from kajiya.models.open import open_model
from kajiya.models.quantized import count_params
from kajiya.models.size import Shape, derive_shape
from kajiya.models.tasks import CAUSAL, Task, auto_class, require_architecture
from kajiya.models.vocabulary import Vocabulary as Vocabulary
from kajiya.models.vocabulary import grow_embedding
from kajiya.models.vocabulary import vocabulary_of as vocabulary_of
from kajiya.run.process import import_transformers, quiet_transformers

_SIZE_FIELDS = {
    "hidden_size": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
}
"""This project's names and those of Transformers' configs, which are mapped further by each config's `attribute_map`."""
_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_OTHER_NAMES = {
    "num_hidden_layers": ("encoder_layers", "decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
    "intermediate_size": ("d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"),
    "head_dim": ("d_kv",),
}
"""Names that encoder–decoders give to the same sizes, one for each half or their own."""


@dataclass(frozen=True)
class BuiltModel:
    """A model and the values that were derived for it."""

    module: nn.Module
    derived: dict[str, Any]


def build_model(config: ModelConfig, vocabulary: Vocabulary, seed: int, task: Task = CAUSAL) -> BuiltModel:
    """The model with the task's head, in float32 on the CPU, its random weights a function of `seed` alone.

    Weights from a folder are quantized as they are read where `config.quantize` says so, so that they never lie there whole.
    """
    quiet_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in config.name:
            return _own_module(config)
        if config.path is not None:
            module = _from_weights(config, task)
            if task.name != "causal":
                module.config.pad_token_id = vocabulary.pad_id
            grown = grow_embedding(module, vocabulary.size, vocabulary.n_added, config.path)
            return BuiltModel(module, grown | {"model.n_params": count_params(module)})
        with _naming_options(config):
            return _from_scratch(config, vocabulary, task)


def _from_weights(config: ModelConfig, task: Task) -> Any:
    """Weights from a folder or the hub; those of an adapter are its base's with the adapter added."""
    path = str(config.path)
    if is_adapter(Path(path)):
        return open_model(Path(path), torch.float32, config.attention, is_merged=True, task=task)
    return load_model(
        path,
        config.revision,
        torch.float32,
        config.attention,
        config.trust_remote_code,
        task,
        quantized=config.quantize,
    )


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


def check_architecture(config: ModelConfig) -> None:
    """Raise `ConfigError` for a model from scratch of an unknown architecture, or with options or sizes that it has not."""
    import_transformers()
    from transformers import CONFIG_MAPPING

    if config.path is not None or ":" in config.name:
        return
    if config.name not in CONFIG_MAPPING:
        hint = nearest(config.name, CONFIG_MAPPING.keys())
        raise ConfigError(
            "model.name",
            f"{config.name!r} is no architecture that Transformers knows" + (f"; {hint}" if hint else ""),
            "A module of your own is named `package.module:function`.",
        )
    _check_fields(config, CONFIG_MAPPING[config.name]())


@contextmanager
def _naming_options(config: ModelConfig) -> Iterator[None]:
    """What Transformers raises over the value of an option, as a `ConfigError` that names it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        if not config.options:
            raise
        said = str(error).splitlines()[-1].strip()
        named = [(key, value) for key, value in config.options.items() if key in said or repr(value) in said]
        key, value = named[0] if len(named) == 1 else ("", config.options)
        field = f"model.options.{key}".removesuffix(".")
        raise ConfigError(field, f"{value!r} is nothing that {config.name} can be built with: {said}") from error


def _from_scratch(config: ModelConfig, vocabulary: Vocabulary, task: Task) -> BuiltModel:
    check_architecture(config)
    shape = derive_shape(config, vocabulary.size)
    architecture = _architecture(config, shape, vocabulary, task)
    require_architecture(task, architecture, "model.name")
    if task.name != "causal" and config.n_params is not None:
        shape, architecture = _fitted_shape(config, shape, vocabulary, task)
    attention = attention_name(config.attention, architecture, task)
    module = auto_class(task).from_config(architecture, attn_implementation=attention, dtype=torch.float32)
    if not config.tied:
        _require_untied(config.name, module)
    if config.zero_outputs:
        _zero_outputs(module)
    if module.can_generate():
        module.generation_config.eos_token_id = vocabulary.eos_id
    known = _known_fields(architecture)
    derived = {f"model.{name}": value for name, value in asdict(shape).items() if _SIZE_FIELDS[name] in known}
    if attention == "eager" and config.attention != "eager":
        derived["model.attention"] = "eager"
    return BuiltModel(module, derived | {"model.n_params": count_params(module)})


def _require_untied(name: str, module: Any) -> None:
    """Raise `ConfigError` for an architecture whose head alone cannot be untied.

    T5 shares head and embedding whatever its config says; BERT and BART would untie biases or embeddings besides, of which one is
    then read by nothing.
    """
    from transformers import PreTrainedModel

    why = None
    if module.config.tie_word_embeddings:
        why = "shares embedding and output head whatever it is told"
    head, names = module.get_output_embeddings(), {id(part): path for path, part in module.named_modules()}
    own = None if head is None else f"{names[id(head)]}.weight"
    for path, part in module.named_modules():
        tied = part._tied_weights_keys if isinstance(part, PreTrainedModel) else None
        for key, source in (tied or {}).items():
            if (f"{path}.{key}" if path else key) != own:
                why = why or f"would untie {key} from {source} too, of which nothing reads one then"
    if why is not None:
        raise ConfigError("model.tied", f"is false, and {name} {why}", "Set model.tied=true.")


def _check_fields(config: ModelConfig, architecture: Any) -> None:
    known = _known_fields(architecture)
    for key in config.options:
        if key in _OF_THE_TOKENIZER:
            raise ConfigError(f"model.options.{key}", "is the tokenizer's to say")
        if key not in known:
            hint = nearest(key, known)
            raise ConfigError(
                f"model.options.{key}", f"is no field of the {config.name} config" + (f"; {hint}" if hint else "")
            )
    for ours, theirs in _SIZE_FIELDS.items():
        if getattr(config, ours) is not None and theirs not in known | set(_OTHER_NAMES):
            raise ConfigError(f"model.{ours}", f"the {config.name} architecture has no such size")


def _architecture(config: ModelConfig, shape: Shape, vocabulary: Vocabulary, task: Task) -> Any:
    """The Transformers config of that shape."""
    from transformers import CONFIG_MAPPING, AutoConfig

    default = CONFIG_MAPPING[config.name]()
    known = _known_fields(default)
    wanted = {_SIZE_FIELDS[name]: value for name, value in asdict(shape).items()} | {
        "head_dim": shape.hidden_size // shape.n_heads,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
    }
    for ours, theirs in _OTHER_NAMES.items():
        wanted |= dict.fromkeys(theirs, wanted[ours])
    fields = {key: value for key, value in wanted.items() if key in known}
    ropes = default.to_dict().get("rope_parameters") or {}
    # An architecture whose layers differ keeps its own angles for each kind.
    if (
        "rope_theta" not in known
        and "rope_parameters" in known
        and not any(isinstance(v, dict) for v in ropes.values())
    ):
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if "decoder_start_token_id" in known or task.name == "seq2seq":
        # As T5 has it: the decoder begins with the padding token.
        fields["decoder_start_token_id"] = vocabulary.pad_id
    return AutoConfig.for_model(
        config.name,
        **fields | task.config_fields() | config.options,
        vocab_size=vocabulary.size,
        bos_token_id=vocabulary.bos_id,
        eos_token_id=vocabulary.eos_id,
        pad_token_id=vocabulary.pad_id,
        tie_word_embeddings=config.tied,
        use_cache=False,
    )


def _fitted_shape(config: ModelConfig, shape: Shape, vocabulary: Vocabulary, task: Task) -> tuple[Shape, Any]:
    """The shape whose model, counted without its weights, comes nearest to `n_params`.

    The formula that the dial is derived with is a decoder's. The others are counted, and the target is corrected by what it missed.
    """
    wanted = parse_count(str(config.n_params), "model.n_params")
    best: tuple[float, Shape, Any] | None = None
    aim = float(wanted)
    for _ in range(4):
        architecture = _architecture(config, shape, vocabulary, task)
        with torch.device("meta"):
            found = count_params(auto_class(task).from_config(architecture))
        miss = abs(math.log(found / wanted))
        if best is None or miss < best[0]:
            best = (miss, shape, architecture)
        aim *= wanted / found
        shape = derive_shape(replace(config, n_params=str(int(aim))), vocabulary.size)
    assert best is not None
    return best[1], best[2]


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
