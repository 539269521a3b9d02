"""Input embeddings of a saved model, read without torch, for TensorBoard's projector."""

from pathlib import Path
from typing import Any

import numpy as np

from kajiya.errors import StoreError
from kajiya.run.files import read_json
from kajiya.run.tensor_headers import read_header

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def read_embeddings(folder: Path, most: int) -> np.ndarray:
    """The first `most` rows of the input embeddings, float32 [tokens, width], of a model in one file or in several.

    Raises `StoreError` with the reason where there are none that can be read.
    """
    path, name = _find(folder)
    begin, entries = read_header(path)
    entry = entries[name]
    if entry["dtype"] not in _DTYPES:
        raise StoreError(f"{name} in {path} is of type {entry['dtype']}, not one of {', '.join(_DTYPES)}")
    rows, width = min(entry["shape"][0], most), entry["shape"][1]
    dtype = _DTYPES[entry["dtype"]]
    with path.open("rb") as handle:
        handle.seek(begin + entry["data_offsets"][0])
        raw = np.frombuffer(handle.read(rows * width * dtype.itemsize), dtype=dtype).reshape(rows, width)
    if entry["dtype"] == "BF16":
        return np.asarray((raw.astype(np.uint32) << 16).view(np.float32))
    return np.asarray(raw.astype(np.float32))


def _find(folder: Path) -> tuple[Path, str]:
    """The file that holds the input embeddings, and the tensor's name in it."""
    if (folder / _INDEX).is_file():
        files: dict[str, str] = read_json(folder / _INDEX)["weight_map"]
    elif (folder / _FILE).is_file():
        files = dict.fromkeys(read_header(folder / _FILE)[1], _FILE)
    else:
        raise StoreError(f"{folder} holds neither {_FILE} nor {_INDEX}")
    name = next((each for each in files if each.endswith(_NAMES)), None)
    if name is None:
        raise StoreError(f"no tensor in {folder} is called {', '.join(_NAMES)}")
    return folder / files[name], name


def token_names(folder: Path, n: int) -> list[str]:
    """A visible name for each of the first `n` token ids."""
    names = [f"#{i}" for i in range(n)]
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        names = [tokenizer.id_to_token(i) or names[i] for i in range(n)]
    return [name.replace("\t", "\\t").replace("\n", "\\n") for name in names]


def write_projector(model: Path, folder: Path, most: int) -> None:
    """Write the embeddings of the model in `model` as TensorBoard's projector reads them. Raises as `read_embeddings` does."""
    found = read_embeddings(model, most)
    np.savetxt(folder / "embeddings.tsv", found, fmt="%.6g", delimiter="\t")
    (folder / "embeddings-tokens.tsv").write_text("\n".join(token_names(model, len(found))) + "\n", encoding="utf-8")
    (folder / "projector_config.pbtxt").write_text(
        'embeddings {\n  tensor_name: "input embeddings"\n  tensor_path: "embeddings.tsv"\n'
        '  metadata_path: "embeddings-tokens.tsv"\n}\n',
        encoding="utf-8",
    )
