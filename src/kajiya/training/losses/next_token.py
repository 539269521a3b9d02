"""The next token: pre-training and fine-tuning on demonstrations."""

from collections.abc import Iterator
from typing import Any

import torch

from kajiya.config.options import NextTokenLoss
from kajiya.data.batch import Batch
from kajiya.models.future import future_heads
from kajiya.models.hidden import all_logits, has_split_head
from kajiya.training.cross_entropy import chunked_cross_entropy
from kajiya.training.losses import Terms
from kajiya.training.losses.noise import noisy_embeddings
from kajiya.training.losses.sequences import split_head


def next_token(model: Any, batch: Batch, options: NextTokenLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of each target under the model, in nats; term `loss`, metric `nll` (without z-loss and smoothing).

    Of a model with heads for the tokens behind the next one, a term `future_k` for each, over the targets that stand k places
    further in the same segment.

    Over the targets, or over the sum of their weights where the batch has weights. A Transformers model goes through the
    chunked head; any other module returns logits [B, T, V] from the tokens [B, T].
    """
    heads = future_heads(model)
    places_n = batch.places if heads is None and batch.tells_places else None
    targets_N = batch.targets.reshape(-1)
    weights_N = None if batch.weights is None else batch.weights.reshape(-1)
    with noisy_embeddings(model, batch.segments, options.neftune_alpha):
        if has_split_head(model):
            hidden_ND, head_VD = split_head(model, batch, places_n)
            if places_n is not None:
                targets_N = targets_N[places_n]
                weights_N = None if weights_N is None else weights_N[places_n]
        else:
            # The head of the identity: logits [N, V] stand for hidden states.
            hidden_ND, head_VD = all_logits(model, batch).flatten(0, 1).float(), None
    if head_VD is not None:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            total, nll = chunked_cross_entropy(
                hidden_ND,
                head_VD,
                targets_N,
                options.chunk_tokens,
                options.z_loss,
                label_smoothing=options.label_smoothing,
                weights_N=weights_N,
                all_wanted=places_n is not None,
            )
    else:
        total, nll = _whole(hidden_ND, targets_N, weights_N, options)
    unit = unit_of(batch)
    terms: Terms = {"loss": (total, unit)}
    metrics: Terms = {"nll": (nll.detach(), unit)}
    if heads is not None and head_VD is not None and batch.future:
        _add_future(terms, metrics, heads(hidden_ND), head_VD, batch, options)
    return terms, metrics


def _add_future(
    terms: Terms,
    metrics: Terms,
    states: Iterator[torch.Tensor],
    head_VD: torch.Tensor,
    batch: Batch,
    options: NextTokenLoss,
) -> None:
    """The weighted cross-entropy of each further token among the terms, and as it is among the metrics."""
    share = options.future_weight / len(batch.future)
    for k, further_ND in enumerate(states, start=1):
        targets, weights = batch.further(k)
        with torch.autocast(further_ND.device.type, enabled=False):
            total, nll = chunked_cross_entropy(
                further_ND.to(head_VD.dtype),
                head_VD,
                targets.reshape(-1),
                options.chunk_tokens,
                weights_N=None if weights is None else weights.reshape(-1),
            )
        terms[f"future_{k}"] = (share * total, f"future_{k}")
        metrics[f"nll_{k + 1}"] = (nll.detach(), f"future_{k}")


def unit_of(batch: Batch) -> str:
    """What a sum over the batch's targets is divided by: their number, or the sum of their weights."""
    return "targets" if batch.weights is None else "loss"


def _whole(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor | None, options: NextTokenLoss
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `chunked_cross_entropy`, of logits at hand."""
    weights = (targets_N >= 0).to(logits_NV.dtype)
    weights = weights if weights_N is None else weights * weights_N
    nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    smoothed_N = nll_N
    if options.label_smoothing:
        smoothed_N = torch.nn.functional.cross_entropy(
            logits_NV, targets_N, reduction="none", label_smoothing=options.label_smoothing
        )
    if options.z_loss:
        smoothed_N = smoothed_N + options.z_loss * logits_NV.logsumexp(1).square()
    return (smoothed_N * weights).sum(), (nll_N * weights).sum()
