"""Input embeddings of a saved model, read without torch, for TensorBoard's projector."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

_FILE = "model.safetensors"
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_embeddings(folder: Path, most: int) -> np.ndarray | None:
    """The first `most` rows of the input embeddings, float32 [tokens, width]; `None` for a model that has none in one file."""
    path = folder / _FILE
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        (n_header,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(n_header))
        name = next((each for each in header if each.endswith(_NAMES)), None)
        if name is None or header[name]["dtype"] not in _DTYPES:
            return None
        entry = header[name]
        rows, width = min(entry["shape"][0], most), entry["shape"][1]
        dtype = _DTYPES[entry["dtype"]]
        handle.seek(8 + n_header + entry["data_offsets"][0])
        raw = np.frombuffer(handle.read(rows * width * dtype.itemsize), dtype=dtype).reshape(rows, width)
    if entry["dtype"] == "BF16":
        return np.asarray((raw.astype(np.uint32) << 16).view(np.float32))
    return np.asarray(raw.astype(np.float32))


def token_names(folder: Path, n: int) -> list[str]:
    """A visible name for each of the first `n` token ids."""
    names = [f"#{i}" for i in range(n)]
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        names = [tokenizer.id_to_token(i) or names[i] for i in range(n)]
    return [name.replace("\t", "\\t").replace("\n", "\\n") for name in names]


def write_projector(model: Path, folder: Path, most: int) -> bool:
    """Write the embeddings of the model in `model` as TensorBoard's projector reads them; whether there were any."""
    found = read_embeddings(model, most)
    if found is None:
        return False
    np.savetxt(folder / "embeddings.tsv", found, fmt="%.6g", delimiter="\t")
    (folder / "embeddings-tokens.tsv").write_text("\n".join(token_names(model, len(found))) + "\n", encoding="utf-8")
    (folder / "projector_config.pbtxt").write_text(
        'embeddings {\n  tensor_name: "input embeddings"\n  tensor_path: "embeddings.tsv"\n'
        '  metadata_path: "embeddings-tokens.tsv"\n}\n',
        encoding="utf-8",
    )
    return True
