"""A model on disk, whatever it is: whole weights, or an adapter and its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kajiya.data.tokenizer import load_tokenizer
from kajiya.errors import ConfigError
from kajiya.models.adapt import use_adapter
from kajiya.models.adapter_files import (
    adapter_task,
    base_folder,
    brings_head,
    is_adapter,
    is_mergeable,
    load_adapter,
    read_base,
)
from kajiya.models.injection import merge
from kajiya.models.load import load_model, stored_dtype
from kajiya.models.origin import Origin, set_origin
from kajiya.models.quantized import dequantize, quantize
from kajiya.models.tasks import CAUSAL, Task
from kajiya.models.vocabulary import grow_embedding


def open_model(
    folder: Path,
    dtype: torch.dtype,
    attention: str = "sdpa",
    *,
    base: str | None = None,
    is_merged: bool = False,
    task: Task | None = None,
    needs_head: bool = False,
) -> Any:
    """The model with the task's head in `folder`, in `dtype`, on the CPU, in evaluation mode.

    An adapter is put beside its base, whose digest is checked; a base that was quantized is taken as the exact weights that the
    adapter was trained beside. With `is_merged` it is added to them. `base` names one in the place of that which the folder
    names. `task` is that of the adapter unless given, and causal for whole weights. With `needs_head` a head over whole texts must
    be in the weights or the adapter: otherwise `ConfigError`.
    """
    if not is_adapter(folder):
        return load_model(folder, dtype=dtype, attention=attention, task=task or CAUSAL, needs_head=needs_head)
    module = open_base(folder, dtype, attention, base, task, needs_head=needs_head and not brings_head(folder))
    load_adapter(module, folder)
    if is_merged:
        merge(module)
        set_origin(module, Origin(str(folder.resolve())))
    return module.eval()


def open_base(
    folder: Path,
    dtype: torch.dtype,
    attention: str = "sdpa",
    base: str | None = None,
    task: Task | None = None,
    *,
    needs_head: bool = False,
) -> Any:
    """The base of the adapter in `folder`: the weights beside which it was trained, dequantized where they were quantized.

    Where the base is an adapter itself, these are its own base's with it added. Tokens that were added for the adapter have rows.
    """
    found = base_folder(folder, base)
    task = task or adapter_task(folder, found)
    module = open_model(found, torch.float32, attention, is_merged=True, task=task, needs_head=needs_head)
    if task.has_new_head and module.config.pad_token_id is None and (folder / "tokenizer_config.json").is_file():
        # As in training: a head over whole texts is told where they end.
        module.config.pad_token_id = load_tokenizer(folder).pad_token_id
    named = read_base(folder)
    if named is not None and named.n_tokens is not None:
        grow_embedding(module, named.n_tokens, named.n_added, str(found))
    if named is not None and named.quantize != "none":
        dequantize(quantize(module, named.quantize), torch.float32)
    return module.to(dtype)


def open_adapters(base: Path, folders: Mapping[str, Path], dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The weights in `base` with several adapters beside them, by name, the first of which is in force; as `open_model`.

    Weights that the adapters were trained beside in few bits are the exact ones that these stand for. Raises `StoreError` for an
    adapter of another base, `ConfigError` for such as cannot stand beside each other.
    """
    for name, folder in folders.items():
        if not name.isidentifier():
            raise ConfigError("adapters", f"{name!r} is no name of one", "Letters, digits and underscores.")
        if not is_adapter(folder):
            raise ConfigError("adapters", f"{name}: {folder} holds a whole model, and no adapter")
        if not is_mergeable(folder) and len(folders) > 1:
            raise ConfigError("adapters", f"{name}: {folder} adds virtual tokens, beside which no other adapter stands")
    first, *others = folders.items()
    for name, folder in others:
        if _needs(folder, base) != _needs(first[1], base):
            raise ConfigError("adapters", f"{name} was trained with another head or other added tokens than {first[0]}")
    module = open_base(first[1], dtype, attention, str(base))
    for name, folder in folders.items():
        load_adapter(module, folder, name)
    use_adapter(module, first[0])
    return module.eval()


def _needs(folder: Path, base: Path) -> tuple[Task, int | None]:
    """What the adapter needs of a base besides its weights: the head, and rows for so many tokens."""
    named = read_base(folder)
    return adapter_task(folder, base), None if named is None else named.n_tokens


def model_dtype(folder: Path) -> torch.dtype:
    """The dtype that the model's weights, or the weights of its base, are stored in."""
    return model_dtype(base_folder(folder)) if is_adapter(folder) else stored_dtype(folder)
