"""Weights that are quantized one by one as they are read from their files: the host never holds them all in float32."""

from functools import cache
from typing import Any

import torch
from torch import nn

from kajiya.models.adapter_targets import expert_names
from kajiya.models.expert_bits import quantize_experts
from kajiya.models.quantized import form_of, quantize_layer, quantized_layers, replace_experts

_METHOD = "kajiya"


def while_reading(kind: str) -> Any:
    """What `from_pretrained(quantization_config=…)` takes, so that each weight that `quantize(module, form_of(module, kind))` would
    replace is read, made float32, quantized and let go before the next one is read.
    """
    return _classes()[0](kind)


@cache
def _classes() -> tuple[type, type]:
    """The classes that Transformers asks for, registered with it once."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Settings(QuantizationConfigMixin):  # type: ignore[misc]
        """In which few bits."""

        def __init__(self, kind: str) -> None:
            self.kind = kind
            self.quant_method = _METHOD  # type: ignore[assignment]

    class Quantize(ConversionOps):  # type: ignore[misc]
        """Puts a quantized layer in the place of the one whose weight was read."""

        def __init__(self, quantizer: Any) -> None:
            self._quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], *_: Any, **given: Any) -> dict[str, Any]:
            return {name: self._quantizer.quantized(given["model"], name, value) for name, value in input_dict.items()}

    class Quantizer(HfQuantizer):  # type: ignore[misc]
        """Quantizes with the layers of `kajiya.models.quantized`, and leaves nothing of itself in the model."""

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            self._weights = {f"{name}.weight" for name, _ in quantized_layers(model)}
            kind = vars(self.quantization_config)["kind"]
            self._experts = set(expert_names(model)) if form_of(model, kind) != kind else set()

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return param_name in self._weights or param_name in self._experts

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def quantized(self, model: Any, name: str, value: Any) -> torch.Tensor:
            """The weight of that name in few bits, its layer in place."""
            value = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            if name in self._experts and value.shape == model.get_parameter(name).shape:
                experts = quantize_experts(value)
                replace_experts(model, name, experts)
                return experts
            if name not in self._weights:
                return value  # type: ignore[no-any-return]
            layer = model.get_submodule(path)
            if value.shape != layer.weight.shape:
                self._weights.discard(name)  # Transformers says then that the two do not fit.
                return value  # type: ignore[no-any-return]
            layer.weight = nn.Parameter(value, requires_grad=False)
            bias = layer.bias
            made = quantize_layer(layer, vars(self.quantization_config)["kind"])
            made.bias = bias  # which bears Transformers' mark of what has been read
            model.set_submodule(path, made)
            return made.weight  # type: ignore[no-any-return]

        def postprocess_model(self, model: Any, **_: Any) -> None:
            for name in self._weights:
                bias = model.get_submodule(name.removesuffix(".weight")).bias
                if bias is not None:
                    bias.requires_grad_(False)
            for name in ("hf_quantizer", "quantization_method", "is_quantized"):
                vars(model).pop(name, None)
            del model.config.quantization_config

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    register_quantization_config(_METHOD)(Settings)
    register_quantizer(_METHOD)(Quantizer)
    return Settings, Quantizer
