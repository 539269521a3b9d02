"""Which numbers the model is computed in, and why."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from kajiya.errors import ConfigError, MissingExtraError
from kajiya.run.process import has_bf16_instructions
from kajiya.training.product_rates import measure_product_rates


@dataclass(frozen=True)
class Precision:
    """Weights' dtype, autocast dtype (`None`: no autocast), and the reason in words."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled, which gradients in fp16 need."""
        return self.autocast == torch.float16

    def convert(self, model: nn.Module) -> nn.Module:
        """The model with what the precision puts in place of its layers: fp8 products, else nothing."""
        return with_fp8_products(model) if self.name == "fp8" else model

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


_KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
    "fp8": (torch.bfloat16, None),
}
PRECISIONS = tuple(_KINDS)
"""Every precision by name."""
_FP8_SINCE = (8, 9)
"""Compute capability of the first GPUs with fp8 products (Ada, Hopper)."""


def resolve_device(name: str, field: str, local_rank: int = 0) -> torch.device:
    """The device of that name; `auto` is CUDA, then Apple's MPS, then the CPU. Raises `ConfigError` when it is not there.

    Of several processes on one machine, each takes the GPU of its own number where the name has none.
    """
    device = _named_device(name, field)
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None and local_rank else device


def _named_device(name: str, field: str) -> torch.device:
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(field, f"{name!r} is no device", "One of auto, cpu, cuda, cuda:0, mps.") from error
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise ConfigError(field, f"{name!r} is not on this machine", "`kajiya doctor` lists what is.")
    return device


def require_tf32(wanted: str, device: torch.device) -> None:
    """Raises `ConfigError` where `train.fp32_matmul` is tf32 and the device has no such products."""
    if wanted == "tf32" and device.type != "cuda":
        raise ConfigError(
            "train.fp32_matmul",
            f"tf32 is how a GPU may multiply fp32, and this is {device.type}",
            "Set train.fp32_matmul=auto.",
        )


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision of that name; `auto` picks bf16 where the hardware multiplies it faster than fp32.

    On a CPU with bf16 instructions that is measured, once in a process. A run records what was picked and keeps it.
    """
    if name == "fp8":
        _require_fp8(device)
    if name != "auto":
        return Precision(name, *_KINDS[name], reason="set in the config")
    chosen, reason = _fastest(device)
    return Precision(chosen, *_KINDS[chosen], reason=reason)


def _fastest(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 tensor cores"
        return "fp32", "this GPU has no bf16 tensor cores"
    if device.type == "cpu":
        return _fastest_on_cpu()
    return "fp32", f"bf16 is not relied on for {device.type}"


def _fastest_on_cpu() -> tuple[str, str]:
    if not has_bf16_instructions():
        return "fp32", "this CPU has no bf16 instructions"
    rates = measure_product_rates()
    measured = f"{rates.bf16 / 1e9:,.0f} GFLOP/s in bf16, {rates.fp32 / 1e9:,.0f} in fp32"
    if rates.prefers_bf16:
        return "bf16", f"this CPU multiplies bf16 {rates.bf16 / rates.fp32:.1f} times as fast ({measured})"
    return "fp32", f"bf16 is no faster on this CPU ({measured})"


def _require_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(
            "train.precision", f"fp8 needs a GPU with fp8 products; this is {device.type}", "Set train.precision=auto."
        )
    found = torch.cuda.get_device_capability(device)
    if found < _FP8_SINCE:
        raise ConfigError(
            "train.precision",
            f"fp8 needs a GPU of compute capability {_FP8_SINCE[0]}.{_FP8_SINCE[1]}; this one has {found[0]}.{found[1]}",
            "Set train.precision=auto.",
        )


def with_fp8_products(model: nn.Module, *, emulated: bool = False) -> nn.Module:
    """The model with its linear layers multiplying in fp8 (torchao, one scale a tensor), all but the output head.

    Only layers whose sizes are multiples of 16 are converted, as the hardware wants it. `emulated`: the factors are rounded to
    fp8 and multiplied as they were, which any device can do, and nobody wants but to see what fp8 does to a result.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise MissingExtraError("torchao", "fp8", "train.precision=fp8") from error
    from transformers import PreTrainedModel

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None

    def fits(layer: nn.Module, _name: str) -> bool:
        return (
            # Not its subclasses, whose weights are stored in fewer bits already.
            type(layer) is nn.Linear
            and layer is not head
            and layer.in_features % 16 == 0
            and layer.out_features % 16 == 0
        )

    if not any(fits(layer, name) for name, layer in model.named_modules()):
        raise ConfigError(
            "train.precision", "fp8 needs linear layers whose sizes are multiples of 16, and this model has none"
        )
    config = Float8LinearConfig(emulate=emulated)
    converted: nn.Module = convert_to_float8_training(model, module_filter_fn=fits, config=config)
    return converted
