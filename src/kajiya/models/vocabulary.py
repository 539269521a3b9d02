"""What a model knows of its tokenizer, and rows of the embedding for tokens that were added to it."""

from dataclasses import dataclass
from typing import Any

import torch

from kajiya.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of its tokenizer."""

    size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    n_added: int = 0
    """Tokens that were added to the tokenizer: the last ids of the vocabulary."""


def vocabulary_of(tokenizer: Any, n_added: int = 0) -> Vocabulary:
    """What a model must know of its tokenizer, to which `n_added` tokens were added."""
    return Vocabulary(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, n_added)


def grow_embedding(module: Any, n_tokens: int, n_added: int, path: str) -> dict[str, int]:
    """Give the last `n_added` of `n_tokens` tokens rows in the embedding and the head of a loaded model.

    Each is the mean of the known tokens' rows.

    (Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021: no new token is then likelier than an
    average one.) Returns what was derived. Raises `ConfigError` where the model lacks rows for other tokens than those.
    """
    rows, n_known = module.get_input_embeddings().num_embeddings, n_tokens - n_added
    if rows < n_known:
        raise ConfigError(
            "model.path",
            f"{path!r} has {rows} embeddings, the tokenizer {n_known} tokens",
            "Set tokenizer.path to the model's own; tokens of your own go in tokenizer.add_tokens.",
        )
    if not n_added:
        return {}
    if rows < n_tokens:
        module.resize_token_embeddings(n_tokens, mean_resizing=False)
    # Some models have spare rows, never trained, where the new tokens fall.
    with torch.no_grad():
        for layer in (module.get_input_embeddings(), module.get_output_embeddings()):
            for name in ("weight", "bias"):
                table = None if layer is None else vars(layer)["_parameters"].get(name)
                if table is not None:
                    table[n_known:n_tokens] = table[:n_known].float().mean(0).to(table.dtype)
    return {"model.added_tokens": n_added}
