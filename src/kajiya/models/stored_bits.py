"""Checkpoints that another library has stored in few bits: which are read, and the plain weights that they stand for."""

from pathlib import Path
from typing import Any

import torch

from kajiya.errors import ConfigError
from kajiya.models.extras import require_bitsandbytes
from kajiya.models.quantized import dequantize

_READ = "bitsandbytes"


def stored_by(architecture: Any) -> str | None:
    """The library or method that a checkpoint's config says its weights are stored by, in few bits; `None`: plainly."""
    fields = getattr(architecture, "quantization_config", None)  # there only where they are
    if fields is None:
        return None
    if "quant_method" in fields:
        return str(fields["quant_method"])
    # As bitsandbytes' first checkpoints said it.
    return _READ if fields.get("load_in_4bit") or fields.get("load_in_8bit") else "by a method without a name"


def require_read(method: str, path: str | Path) -> None:
    """Raise `ConfigError` for a method whose weights are not read here, `MissingExtraError` where its package is missing."""
    if method != _READ:
        raise ConfigError(
            "model.path",
            f"{str(path)!r} is stored quantized ({method}), which is not read here; of such, {_READ} is",
            "Give the model that it was made from; model.quantize and serve.quantize make few bits of that. "
            "serve.engine=vllm serves many a method as it is.",
        )
    require_bitsandbytes(f"{str(path)!r}, stored quantized ({method}),")


def as_plain(module: Any, dtype: torch.dtype) -> Any:
    """The loaded module with plain layers of the exact weights that its layers stand for, in `dtype`, on the CPU, in place."""
    dequantize(module, dtype)
    module.hf_quantizer.remove_quantization_config(module)
    return module.to(device="cpu", dtype=dtype)
