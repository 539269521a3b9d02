"""One digest for the same weights: of files, over the tensors by name however they are cut; and of tensors in memory."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import StoreError
from kajiya.models.quantized import plain_tensors
from kajiya.run.tensor_headers import read_header

_CHUNK = 16 * 2**20


def weights_digest(folder: Path) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor in the folder's safetensors, 64 hex digits."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StoreError(f"{folder}: has no safetensors")
    stats = [(path, path.stat()) for path in files]
    return _digest(tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats))


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor, in the order given, 64 hex digits."""
    hasher = hashlib.sha256()
    for name, tensor in tensors:
        hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        for part in plain_tensors(tensor.detach()):
            hasher.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


@cache
def _digest(files: tuple[tuple[str, int, int, int], ...]) -> str:
    """As files are written once and renamed, size, time and inode say whether one is the same as before."""
    places: dict[str, tuple[str, int, dict[str, Any]]] = {}
    for path, *_ in files:
        begin, entries = read_header(Path(path))
        places |= {name: (path, begin, entry) for name, entry in entries.items()}
    hasher = hashlib.sha256()
    for name in sorted(places):
        path, start, entry = places[name]
        hasher.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with Path(path).open("rb") as handle:
            handle.seek(start + begin)
            left = end - begin
            while left:
                data = handle.read(min(left, _CHUNK))
                if not data:
                    raise StoreError(f"{path}: ends before its tensor {name!r}")
                hasher.update(data)
                left -= len(data)
    return hasher.hexdigest()
