"""Where a model's tokenizer is, and whether two models read the same tokens."""

from pathlib import Path
from typing import Any

from kajiya.models.adapter_files import base_folder, is_adapter


def tokenizer_folder(model: Path) -> Path:
    """The model's own folder, or of an adapter without a tokenizer its base's."""
    return base_folder(model) if is_adapter(model) and not has_tokenizer(model) else model


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in the folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def odd_token(first: Any, other: Any) -> tuple[str, int] | None:
    """The first token, and its number, that one of two tokenizers has there alone; `None` where they know the same."""
    odd = sorted(first.get_vocab().items() ^ other.get_vocab().items(), key=lambda each: (each[1], each[0]))
    return odd[0] if odd else None
