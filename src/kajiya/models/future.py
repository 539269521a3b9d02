"""Heads that say the tokens behind the next one, from the same state: a help in training, left out of what is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kajiya.errors import ConfigError
from kajiya.models.hidden import has_split_head

ATTRIBUTE = "future_heads"
"""Name of the module under which a model has them."""


class FutureHeads(nn.Module):
    """Multi-token prediction (Gloeckle et al., arXiv:2404.19737): one block a token further, all before the model's own head.

    A block is h + silu(W h) (Cai et al., Medusa, arXiv:2401.10774, section 2.1.1), W zero at first, so that each begins as the
    state of the next token.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(n))
        for block in self.blocks:
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]

    def forward(self, hidden_ND: torch.Tensor) -> Iterator[torch.Tensor]:
        """The states [N, D] before the head, one token further each."""
        for block in self.blocks:
            yield hidden_ND + nn.functional.silu(block(hidden_ND))


def add_future_heads(module: Any, n: int) -> dict[str, Any]:
    """Give the model heads for `n` tokens behind the next; returns what was derived. Raises `ConfigError` where it has no head."""
    if n == 0:
        return {}
    if not has_split_head(module):
        raise ConfigError(
            "model.future_heads", f"{type(module).__name__} has no plain head that further ones could share"
        )
    heads = FutureHeads(n, module.get_output_embeddings().weight.shape[1])
    module.add_module(ATTRIBUTE, heads)
    return {"model.future_params": sum(each.numel() for each in heads.parameters())}


def future_heads(module: nn.Module) -> FutureHeads | None:
    """Those of the model, or `None`."""
    found = module._modules.get(ATTRIBUTE)
    return found if isinstance(found, FutureHeads) else None


@contextmanager
def without_future_heads(module: nn.Module) -> Iterator[None]:
    """Within the block the model has none of them."""
    heads = module._modules.pop(ATTRIBUTE, None)
    try:
        yield
    finally:
        if heads is not None:
            module.add_module(ATTRIBUTE, heads)
