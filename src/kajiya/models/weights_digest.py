"""One digest for the same weights: over the tensors by name, however they are cut into files."""

import hashlib
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from kajiya.errors import StoreError

_CHUNK = 16 * 2**20


def weights_digest(folder: Path) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor in the folder's safetensors, 64 hex digits."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StoreError(f"{folder}: has no safetensors")
    stats = [(path, path.stat()) for path in files]
    return _digest(tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats))


@cache
def _digest(files: tuple[tuple[str, int, int, int], ...]) -> str:
    """As files are written once and renamed, size, time and inode say whether one is the same as before."""
    places: dict[str, tuple[str, int, dict[str, Any]]] = {}
    for path, *_ in files:
        with Path(path).open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        places |= {name: (path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
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
