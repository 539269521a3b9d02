"""Tensors cut into pieces over several files, and the index that says where each piece belongs.

Index: `{name: {"shape": [global shape], "pieces": [{"file", "offsets": [first index in each dimension]}]}}`. One process writes
one file of whole tensors; ranks that hold shards write a file each, under the same names, and one index.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import StoreError


def index_of(tensors: Mapping[str, torch.Tensor], file: str) -> dict[str, Any]:
    """The index of whole tensors in one file."""
    return {
        name: {"shape": list(tensor.shape), "pieces": [{"file": file, "offsets": [0] * tensor.ndim}]}
        for name, tensor in tensors.items()
    }


def read_pieces(folder: Path, index: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of the index, whole. Raises `StoreError` where pieces are missing or do not fill their tensor."""
    from safetensors.torch import load_file

    files = {piece["file"] for entry in index.values() for piece in entry["pieces"]}
    loaded = {file: load_file(folder / file) for file in sorted(files)}
    return {name: _whole(folder, name, entry, loaded) for name, entry in index.items()}


def _whole(
    folder: Path, name: str, entry: Mapping[str, Any], loaded: Mapping[str, Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    pieces = []
    for piece in entry["pieces"]:
        if name not in loaded[piece["file"]]:
            raise StoreError(
                f"{folder}: the index says that {piece['file']} holds a piece of {name!r}, which it does not"
            )
        pieces.append((loaded[piece["file"]][name], piece["offsets"]))
    shape = torch.Size(entry["shape"])
    if len(pieces) == 1 and pieces[0][0].shape == shape:
        return pieces[0][0]
    if sum(tensor.numel() for tensor, _ in pieces) != shape.numel():
        raise StoreError(f"{folder}: the pieces of {name!r} do not fill its shape {list(shape)}")
    whole = torch.empty(shape, dtype=pieces[0][0].dtype)
    for tensor, offsets in pieces:
        place = tuple(slice(first, first + n) for first, n in zip(offsets, tensor.shape, strict=True))
        whole[place] = tensor
    return whole
