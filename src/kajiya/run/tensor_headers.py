"""What a safetensors file says of its tensors, read without them."""

import json
import struct
from pathlib import Path
from typing import Any


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Byte at which the tensors begin, and of each by name its `dtype` (`F32` …), `shape` and `data_offsets` from there."""
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        entries = json.loads(handle.read(length))
    return 8 + length, {name: entry for name, entry in entries.items() if name != "__metadata__"}
