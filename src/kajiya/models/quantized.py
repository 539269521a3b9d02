"""Frozen linear layers in few bits, and a mixture's experts: NF4 with double quantization, LLM.int8, torchao's int8; on a CPU or a
GPU.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kajiya.errors import ConfigError, MissingExtraError
from kajiya.models.adapter_targets import expert_names
from kajiya.models.expert_bits import NF4Experts, quantize_experts
from kajiya.models.extras import require_bitsandbytes
from kajiya.models.origin import set_form
from kajiya.models.tasks import CLASS_HEADS


def form_of(module: nn.Module, kind: str) -> str:
    """The bits that `model.quantize` means for this module: with experts in it nf4 is nf4-experts, which has them too."""
    return _WITH_EXPERTS if kind == "nf4" and expert_names(module) else kind


def quantize(module: nn.Module, form: str) -> nn.Module:
    """Replace the weights of every linear layer of `module` but its heads, in place; `form` is what `form_of` gives.

    nf4: 4-bit NormalFloat in blocks of 64, the blocks' scales in 8 bits (QLoRA, arXiv:2305.14314, sections 3 and 4); nf4-experts:
    a mixture's experts too; int8: LLM.int8
    with outlier columns of activations kept (arXiv:2208.07339); torchao-int8: weights alone, a scale a row. The layers compute in
    the dtype of what they read. Those that were quantized while they were read stay as they are. Raises `ConfigError` for a
    module without linear layers.
    """
    if form == "none":
        return module
    if not any(map(is_quantized, module.parameters())):
        found = quantized_layers(module)
        if not found:
            raise ConfigError("model.quantize", f"{type(module).__name__} has no linear layer to quantize")
        while found:
            name, layer = found.pop(0)  # so that nothing holds a layer whose place another has taken
            module.set_submodule(name, quantize_layer(layer, form))
    for name in expert_names(module) if form == _WITH_EXPERTS else ():
        experts = module.get_parameter(name)
        if not is_quantized(experts):
            replace_experts(module, name, quantize_experts(experts))
    if form in ("nf4", _WITH_EXPERTS, "int8"):
        # PEFT's layers look here for what they stand beside.
        setattr(module, "is_loaded_in_8bit" if form == "int8" else "is_loaded_in_4bit", True)
    set_form(module, form)
    return module


def replace_experts(module: nn.Module, name: str, experts: nn.Parameter) -> None:
    """Put experts in the place of those of that full name."""
    path, _, own = name.rpartition(".")
    setattr(module.get_submodule(path), own, experts)


def quantize_layer(layer: nn.Linear, form: str) -> Any:
    """A layer with the weights of another one in few bits, and its bias; as `quantize`."""
    return _KINDS[form](layer)


def dequantize(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace quantized layers, and experts, by plain ones of the exact weights that they stand for, in `dtype`, in place."""
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear) and is_quantized(part.weight):
            plain = nn.Linear(part.in_features, part.out_features, part.bias is not None, part.weight.device, dtype)
            plain.weight = nn.Parameter(weight_values(part).to(dtype), requires_grad=False)
            if part.bias is not None:
                plain.bias = nn.Parameter(part.bias.detach().to(dtype), requires_grad=False)
            module.set_submodule(name, plain)
    for name in expert_names(module):
        experts = module.get_parameter(name)
        if is_quantized(experts):
            plain_experts = nn.Parameter(experts.dequantize().to(dtype), requires_grad=False)
            replace_experts(module, name, plain_experts)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(module).pop(flag, None)
    return module


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the tensor stands for weights in few bits."""
    return type(parameter).__name__ in _VALUES


def weight_values(layer: Any) -> torch.Tensor:
    """The weights [out, in] that a quantized linear layer stands for, in the dtype that they had."""
    values: torch.Tensor = _VALUES[type(layer.weight).__name__](layer.weight).detach()
    return values.reshape(layer.out_features, layer.in_features)


def n_values(parameter: torch.Tensor) -> int:
    """Parameters that a tensor stands for: two in each byte of an NF4 weight."""
    if type(parameter).__name__ == "Params4bit":
        return int(torch.Size(parameter.quant_state.shape).numel())  # type: ignore[attr-defined]
    return parameter.numel()


def count_params(module: nn.Module, *, trainable: bool = False) -> int:
    """Parameters of the module, or those that are trained; shared ones count once."""
    return sum(n_values(each) for each in module.parameters() if each.requires_grad or not trainable)


def stored_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes that the weights of quantized layers and experts take, scales included, and the parameters that they stand for."""
    experts = [each for each in module.parameters() if isinstance(each, NF4Experts)]
    n_bytes, n_params = sum(map(_bytes, experts)), sum(each.numel() for each in experts)
    for part in module.modules():
        if not isinstance(part, nn.Linear) or not is_quantized(part.weight):
            continue
        held = part.state_dict()
        n_bytes += sum(_bytes(each) for name, each in held.items() if isinstance(each, torch.Tensor) and name != "bias")
        n_params += part.in_features * part.out_features
    return n_bytes, n_params


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that one consists of: itself, or the integers and the scales behind torchao's, and behind experts."""
    if isinstance(tensor, NF4Experts):
        return list(tensor.parts)
    if type(tensor).__name__ == "Int8Tensor":
        return [tensor.qdata, tensor.scale]  # type: ignore[attr-defined]
    return [tensor]


def _bytes(tensor: torch.Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in plain_tensors(tensor))


def quantized_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers that are quantized: all but heads, and what Transformers says must stay in float32 (T5's `wo`, whose
    forward pass asks its weight's dtype).
    """
    from transformers import PreTrainedModel

    known: Any = module if isinstance(module, PreTrainedModel) else None
    head = None if known is None else known.get_output_embeddings()
    whole = {*CLASS_HEADS, *(() if known is None else known._keep_in_fp32_modules or ())}
    return [
        (name, part)
        for name, part in module.named_modules()
        if type(part) is nn.Linear and part is not head and not whole & set(name.split("."))
    ]


def _nf4(layer: nn.Linear) -> nn.Module:
    bnb = require_bitsandbytes("model.quantize")
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4")
    # On a CPU its layer would pack the weights anew for evaluation, and round there as it does not in training.
    made.support_avx512bf16_for_cpu = False
    # It would keep to the dtype of the first activations that it reads: autocast's, for passes without autocast too.
    made.compute_type_is_set = True
    weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    )
    return _filled(made, weight.to(layer.weight.device), layer)


def _int8(layer: nn.Linear) -> nn.Module:
    bnb = require_bitsandbytes("model.quantize")
    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _filled(made, weight.to(layer.weight.device), layer)


def _torchao_int8(layer: nn.Linear) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingExtraError("torchao", "quant", "model.quantize=torchao-int8") from error
    layer.requires_grad_(False)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer


def _filled(made: Any, weight: torch.Tensor, layer: nn.Linear) -> nn.Module:
    made.weight = weight
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    made.train(layer.training)
    return made  # type: ignore[no-any-return]


def _values_nf4(weight: Any) -> torch.Tensor:
    return require_bitsandbytes("model.quantize").functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]


def _values_int8(weight: Any) -> torch.Tensor:
    # LLM.int8, equation 1: a row's largest absolute value stands for 127.
    rows = weight.data if weight.CB is None else weight.CB
    return rows.float() * (weight.SCB / 127).unsqueeze(1)  # type: ignore[no-any-return]


_WITH_EXPERTS = "nf4-experts"
_KINDS: Mapping[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _nf4,
    _WITH_EXPERTS: _nf4,
    "int8": _int8,
    "torchao-int8": _torchao_int8,
}
_VALUES: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "Params4bit": _values_nf4,
    "Int8Params": _values_int8,
    "Int8Tensor": lambda weight: weight.dequantize(),
    "NF4Experts": lambda weight: weight.dequantize(),
}
"""How each library's tensor of few bits, by its class's name, gives its values back."""
