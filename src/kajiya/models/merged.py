"""The weights that a model computes with while an adapter is trained, as those of the plain model: nothing in it changes."""

from typing import Any

import torch
from torch import nn

from kajiya.errors import ConfigError
from kajiya.models.injection import (
    adapters_of,
    in_force,
    is_of_parameter,
    is_token_wrapper,
    is_wrapper,
    layers,
    lora_bias,
)
from kajiya.models.quantized import is_quantized, weight_values
from kajiya.models.virtual_tokens import virtual_tokens


@torch.no_grad()
def merged_tensors(module: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the names of the plain Transformers model's `state_dict`, in `dtype`: the adapter in force added, quantized weights
    as what they stand for. Tensors that are in `dtype` already are the model's own.

    Raises `ConfigError` for an adapter that is no change of weights.
    """
    if virtual_tokens(module) is not None:
        raise ConfigError("adapter", "virtual tokens are no change of the weights, so they cannot be merged into them")
    tensors = _all(module, {id(part) for part in layers(module)})
    return {name: value.detach().to(dtype) for name, value in tensors.items()}


def _all(module: nn.Module, changed: set[int]) -> dict[str, torch.Tensor]:
    """Tensors of the module and what is in it, those of the parts whose ids are `changed` as the adapter makes them."""
    tensors: dict[str, torch.Tensor] = {}
    whole = None
    for path, part in module.named_modules():
        if whole is not None and path.startswith(f"{whole}."):
            continue  # a part of a layer that was taken as one
        whole = path if id(part) in changed else None
        found = _own(part) if whole is None else _of_changed(part, changed)
        tensors |= {f"{path}.{name}" if path else name: value for name, value in found.items()}
    return tensors


def _own(part: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and lasting buffers of the module itself, without those of its children."""
    own = {name: each for name, each in part._parameters.items() if each is not None}
    for name, buffer in part._buffers.items():
        if buffer is not None and name not in part._non_persistent_buffers_set:
            own[name] = buffer  # type: ignore[assignment]
    return {name: _plain(part, each) for name, each in own.items()}


def _plain(part: Any, tensor: torch.Tensor) -> torch.Tensor:
    if not is_quantized(tensor):
        return tensor
    return weight_values(part) if isinstance(part, nn.Linear) else tensor.dequantize()


def _of_changed(part: Any, changed: set[int]) -> dict[str, torch.Tensor]:
    if is_wrapper(part):
        return _own(in_force(part))
    if is_token_wrapper(part):
        return _of_tokens(part.token_adapter)
    if type(part).__name__ == "TrainableTokensLayer":
        return _of_tokens(part)
    return _of_parameters(part, changed) if is_of_parameter(part) else _of_layer(part)


def _of_tokens(part: Any) -> dict[str, torch.Tensor]:
    return _own(part.get_base_layer()) | {"weight": part.get_merged_weights(part.active_adapters)}


def _of_parameters(part: Any, changed: set[int]) -> dict[str, torch.Tensor]:
    tensors = _all(part.get_base_layer(), changed)
    while is_of_parameter(part):
        for name in adapters_of(part).intersection(part.active_adapters):
            tensors[part.parameter_name] = tensors[part.parameter_name].float() + part.get_delta_weight(name).float()
        part = part.base_layer
    return tensors


def _of_layer(part: Any) -> dict[str, torch.Tensor]:
    tensors = _own(part.get_base_layer())
    names = adapters_of(part).intersection(part.active_adapters)
    if not names:
        return tensors
    (name,) = names
    weight = tensors["weight"].float()
    if name in getattr(part, "ia3_l", {}):
        factor = part.ia3_l[name].float()
        if "bias" in tensors and not part.is_feedforward:
            tensors["bias"] = tensors["bias"].float() * factor.reshape(-1)
        return tensors | {"weight": weight * (factor.T if part.fan_in_fan_out else factor)}
    weight = weight + part.get_delta_weight(name).float()
    if lora_bias(part, name):
        tensors["bias"] = tensors["bias"].float() + part.lora_B[name].bias.float() * part.scaling[name]
    magnitude = getattr(part, "lora_magnitude_vector", None) or {}
    if name in magnitude:
        # DoRA, equation 5: each output's direction, scaled to its own length. GPT-2's layers keep weights [in, out].
        inputs = 0 if part.fan_in_fan_out else 1
        weight = weight * (magnitude[name].weight.float().unsqueeze(inputs) / weight.norm(dim=inputs, keepdim=True))
    return tensors | {"weight": weight}
