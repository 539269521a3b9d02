"""Random weights of a shape that is too large to build in float32 on the host: made tensor by tensor, on a GPU if there is one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kajiya.config.schema import Config

_SHARD_BYTES = 4 * 2**30


def empty_model(config: "Config", tokenizer: Any, vocab_size: int) -> "nn.Module":
    """The config's model without memory for its weights; its vocabulary may be larger than the tokenizer's."""
    import torch

    from kajiya.models.build import build_model, vocabulary_of

    known = replace(vocabulary_of(tokenizer), size=vocab_size)
    with torch.device("meta"):
        return build_model(config.model, known, config.seed).module


def write_weights(
    model: "nn.Module", tokenizer: Any, dtype: "torch.dtype", seed: int, folder: Path, shard_bytes: int = _SHARD_BYTES
) -> None:
    """A folder that `from_pretrained` reads: config, tokenizer, and weights in `dtype` in files of at most `shard_bytes`.

    Norms are 1, all else is normal with the config's deviation; no more than one file's tensors are in memory.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    assert isinstance(model, PreTrainedModel)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    shards = list(_shards(model, dtype.itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in names.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            is_norm = len(shape) == 1
            made = (
                tensor.fill_(1) if is_norm else tensor.normal_(0, model.config.initializer_range, generator=generator)
            )
            tensors[name] = made.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(shape.numel() for names in shards for shape in names.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(model: "nn.Module", itemsize: int, shard_bytes: int) -> Iterator[dict[str, "torch.Size"]]:
    """Names and shapes of each file's tensors; of tied weights one."""
    held: dict[str, torch.Size] = {}
    size = 0
    for name, parameter in model.named_parameters():
        if held and size + parameter.numel() * itemsize > shard_bytes:
            yield held
            held, size = {}, 0
        held[name] = parameter.shape
        size += parameter.numel() * itemsize
    yield held
