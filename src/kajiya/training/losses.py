"""Losses: `loss(model, batch, options) -> {term: (sum, count)}, metrics`.

A term is a sum over what it counts, never a mean: the loop divides each once by its count over the whole group of micro-batches
and all ranks, so the result depends on neither. Metrics are `{name: (sum, count)}` too, without gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kajiya.config.options import NextTokenLoss
from kajiya.config.schema import LossConfig
from kajiya.config.tables import is_options, resolve
from kajiya.data.batch import Batch
from kajiya.models.hidden import all_logits, has_split_head, last_hidden
from kajiya.training.cross_entropy import chunked_cross_entropy

Terms = dict[str, tuple[torch.Tensor, int]]
Loss = Callable[[Any, Batch], tuple[Terms, Terms]]


def load_loss(config: LossConfig) -> Loss:
    """The loss that the config names, its options bound."""
    function, options = resolve("loss", config.name, config.options, "train.loss")
    return partial(function, options=options) if is_options(options) else partial(function, **options)


def next_token(model: Any, batch: Batch, options: NextTokenLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of each target under the model, in nats; term `loss`, metric `nll` (without the z-loss).

    A Transformers model goes through the chunked head; any other module returns logits [B, T, V] from the tokens [B, T].
    """
    targets = batch.targets.reshape(-1)
    if has_split_head(model):
        hidden = last_hidden(model, batch)
        head = model.get_output_embeddings().weight
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        with torch.autocast(device, enabled=False):
            total, nll = chunked_cross_entropy(flat, head.to(dtype), targets, options.chunk_tokens, options.z_loss)
    else:
        logits = all_logits(model, batch)
        flat = logits.reshape(-1, logits.shape[-1]).float()
        total = nll = torch.nn.functional.cross_entropy(flat, targets, reduction="sum")
        if options.z_loss:
            wanted = targets >= 0
            total = nll + options.z_loss * (flat.logsumexp(1).square() * wanted).sum()
    return {"loss": (total, batch.n_targets)}, {"nll": (nll.detach(), batch.n_targets)}
