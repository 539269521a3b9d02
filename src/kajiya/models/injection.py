"""PEFT's layers put into a model in place, and taken out again."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from kajiya.errors import ConfigError
from kajiya.models.origin import set_origin
from kajiya.run.process import quiet_transformers

BEGINNING = ("initial_A", "initial_B")
"""Buffers with the first matrices of an adapter whose beginning was taken out of the weights."""


def inject(module: Any, config: Any, name: str) -> None:
    """Freeze the model and put the layers of PEFT's `config` beside its own, under the adapter's `name`.

    Raises `ConfigError` with PEFT's own words where the two do not fit.
    """
    from peft import inject_adapter_in_model

    quiet_transformers()
    try:
        with warnings.catch_warnings():
            # Merging goes through the dequantized weights here, not through torchao's own layer.
            warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")
            # Several adapters on one base are what is wanted.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if config.peft_type.value == "LORA" and config.target_parameters:
                # PEFT looks for them among modules alone, and follows those of parameters too.
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            inject_adapter_in_model(config, module, name)
    except ValueError as error:
        raise ConfigError("adapter", " ".join(str(error).split())) from error
    if takes_from_base(config):
        _remember_beginning(module, name)


def takes_from_base(config: Any) -> bool:
    """Whether the adapter's beginning was taken out of the weights (PiSSA, OLoRA), which are incomplete without it."""
    return bool(config.peft_type.value == "LORA" and config.init_lora_weights in ("pissa", "olora"))


def layers(module: nn.Module) -> Iterator[Any]:
    """Every layer of an adapter, and every wrapper of a module that one trains whole or in single rows."""
    if "peft_config" not in vars(module):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    within = {id(part.token_adapter) for part in module.modules() if is_token_wrapper(part)}
    for part in module.modules():
        if (isinstance(part, BaseTunerLayer) and id(part) not in within) or is_wrapper(part) or is_token_wrapper(part):
            yield part


def adapters_of(part: Any) -> set[str]:
    """Names of the adapters that change this one of `layers`."""
    if is_wrapper(part) or is_token_wrapper(part):
        return set(part._adapters)
    return {name for attribute in part.adapter_layer_names for name in getattr(part, attribute)}


def is_wrapper(part: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of a module that an adapter trains whole."""
    return type(part).__name__ == "ModulesToSaveWrapper"


def is_token_wrapper(part: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of an embedding or head of which an adapter trains the rows of single tokens."""
    return type(part).__name__ == "TrainableTokensWrapper"


def is_of_parameter(part: nn.Module) -> bool:
    """Whether it is PEFT's layer around a module of which one parameter is adapted, as of a mixture's experts; such layers of
    several parameters stand around each other.
    """
    return type(part).__name__ == "ParamWrapper"


def in_force(wrapper: Any) -> Any:
    """The module that a wrapper computes with: that of its adapter in force, or the model's own."""
    names = wrapper.active_adapters
    return wrapper.modules_to_save[names[0]] if names else wrapper.original_module


def lora_bias(part: Any, name: str) -> bool:
    """Whether the adapter of that name adds a bias behind its matrices (PEFT's `lora_bias`).

    Raises `ConfigError` where the layer has none that it could be added to.
    """
    if not getattr(part, "lora_bias", {}).get(name):
        return False
    if part.get_base_layer().bias is None:
        raise ConfigError(
            "adapter", "has a bias (lora_bias) beside a layer without one, so it cannot be merged into it"
        )
    return True


def merge(module: Any) -> None:
    """Add the adapter in force to the weights, in place, and take its layers out.

    Raises `ConfigError` for one that is no change of weights (prefix, prompt), or beside quantized weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from kajiya.models.quantized import is_quantized
    from kajiya.models.virtual_tokens import ATTRIBUTE

    if ATTRIBUTE in module._modules:
        raise ConfigError("merge", "virtual tokens are no change of the weights, so they cannot be merged into them")
    if any(is_quantized(parameter) for parameter in module.parameters()):
        raise ConfigError("merge", "the weights are quantized; an adapter merges into dequantized ones")
    # From the inside out: of layers around each other each is added to what is innermost.
    for name, part in reversed(list(module.named_modules())):
        if isinstance(part, BaseTunerLayer):
            for each in list(part.active_adapters):  # type: ignore[arg-type]
                lora_bias(part, each)
            part.merge(safe_merge=True)  # type: ignore[operator]
            module.set_submodule(name, part.get_base_layer())
        elif is_wrapper(part):
            module.set_submodule(name, in_force(part))
        elif is_token_wrapper(part):
            module.set_submodule(name, part.token_adapter)  # type: ignore[arg-type]  # by now the plain layer
    del module.peft_config
    set_origin(module, None)
    head = module.get_output_embeddings()
    if head is not None and head.weight is not module.get_input_embeddings().weight:
        module.config.tie_word_embeddings = False


def _remember_beginning(module: nn.Module, name: str) -> None:
    """Keep the first matrices of PiSSA and OLoRA: what was taken out of the weights is their product."""
    for part in layers(module):
        if not is_wrapper(part) and not is_token_wrapper(part) and name in part.lora_A:
            for buffer, matrices in zip(BEGINNING, (part.lora_A, part.lora_B), strict=True):
                part.register_buffer(buffer, matrices[name].weight.detach().clone())
