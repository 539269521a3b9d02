"""NEFTune: noise on the embeddings of training tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from kajiya.errors import ConfigError

_is_off = ContextVar("_is_off", default=False)


@contextmanager
def without_noise() -> Iterator[None]:
    """Within the block no noise is added, in training mode too: for what compares one step with another."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


@contextmanager
def noisy_embeddings(model: Any, segments_BT: torch.Tensor, alpha: float | None) -> Iterator[None]:
    """Within the block, a model in training mode gets uniform noise of ± alpha / √(L · D) on each embedding.

    L is the length of the token's segment, D the width (Jain et al., NEFTune, arXiv:2310.05914, algorithm 1). `None`: no noise.
    """
    if alpha is None or not model.training or _is_off.get():
        yield
        return
    embedding = _embedding(model)
    length_BT1 = _segment_lengths(segments_BT).unsqueeze(-1)

    def add_noise(_module: Any, _given: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        scale = alpha / (length_BT1 * output_BTD.shape[-1]).sqrt()
        return output_BTD + (torch.rand_like(output_BTD) * 2 - 1) * scale.to(output_BTD.dtype)

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _embedding(model: Any) -> Any:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            "train.loss.options.neftune_alpha",
            f"{type(model).__name__} does not say which of its layers is the embedding",
            "Set it to null, or use a model that Transformers knows.",
        )
    return model.get_input_embeddings()


def _segment_lengths(segments_BT: torch.Tensor) -> torch.Tensor:
    """Tokens in the segment of each token, float32 [B, T]."""
    counts = torch.zeros_like(segments_BT).scatter_add_(1, segments_BT, torch.ones_like(segments_BT))
    return counts.gather(1, segments_BT).float()
