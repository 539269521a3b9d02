"""Which numbers the model is computed in, and why."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from kajiya.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Weights' dtype, autocast dtype (`None`: no autocast), and the reason in words."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


_KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}


def resolve_device(name: str, field: str) -> torch.device:
    """The device of that name; `auto` is CUDA, then Apple's MPS, then the CPU. Raises `ConfigError` when it is not there."""
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


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision of that name; `auto` picks bf16 where the hardware multiplies it faster than fp32."""
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
        if torch.cpu._is_amx_tile_supported():
            return "bf16", "this CPU has AMX tiles for bf16"
        return "fp32", "this CPU has no AMX; without it bf16 products are no faster"
    return "fp32", f"bf16 is not relied on for {device.type}"
