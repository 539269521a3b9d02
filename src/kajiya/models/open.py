"""A model on disk, whatever it is: whole weights, or an adapter and its base."""

from pathlib import Path
from typing import Any

import torch

from kajiya.models.adapter_files import base_folder, is_adapter, load_adapter, read_base
from kajiya.models.injection import merge
from kajiya.models.load import load_model, stored_dtype
from kajiya.models.quantized import dequantize, quantize
from kajiya.models.tasks import CAUSAL, Task


def open_model(
    folder: Path,
    dtype: torch.dtype,
    attention: str = "sdpa",
    *,
    base: str | None = None,
    is_merged: bool = False,
    task: Task = CAUSAL,
) -> Any:
    """The model with the task's head in `folder`, in `dtype`, on the CPU, in evaluation mode.

    An adapter is put beside its base, whose digest is checked; a base that was quantized is taken as the exact weights that the
    adapter was trained beside. With `is_merged` it is added to them. `base` names one in the place of that which the folder names.
    """
    if not is_adapter(folder):
        return load_model(folder, dtype=dtype, attention=attention, task=task)
    module = open_base(folder, dtype, attention, base, task)
    load_adapter(module, folder)
    if is_merged:
        merge(module)
    return module.eval()


def open_base(
    folder: Path, dtype: torch.dtype, attention: str = "sdpa", base: str | None = None, task: Task = CAUSAL
) -> Any:
    """The base of the adapter in `folder`: the weights beside which it was trained, dequantized where they were quantized."""
    module = load_model(base_folder(folder, base), dtype=torch.float32, attention=attention, task=task)
    named = read_base(folder)
    if named is not None and named.quantize != "none":
        dequantize(quantize(module, named.quantize), torch.float32)
    return module.to(dtype)


def model_dtype(folder: Path) -> torch.dtype:
    """The dtype that the model's weights, or the weights of its base, are stored in."""
    if not is_adapter(folder):
        return stored_dtype(folder)
    return stored_dtype(base_folder(folder))
