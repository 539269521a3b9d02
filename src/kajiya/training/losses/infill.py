"""Tokens that the model reads around (masked-LM) or from an input (encoder–decoder)."""

from typing import Any

import torch

from kajiya.config.options import MaskedLoss, Seq2SeqLoss
from kajiya.data.batch import Batch, Seq2SeqBatch
from kajiya.models.outputs import masked_logits, seq2seq_logits
from kajiya.training.losses import Terms


def masked_lm(model: Any, batch: Batch, options: MaskedLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of each masked token (Devlin et al., BERT, arXiv:1810.04805, section 3.1); metrics `nll`, `accuracy`."""
    return _cross_entropy(masked_logits(model, batch), batch, options.label_smoothing)


def seq2seq(model: Any, batch: Seq2SeqBatch, options: Seq2SeqLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of each token of the target, given the input and those before it; metrics `nll`, `accuracy`."""
    return _cross_entropy(seq2seq_logits(model, batch), batch, options.label_smoothing)


def _cross_entropy(logits_BTV: torch.Tensor, batch: Batch | Seq2SeqBatch, smoothing: float) -> tuple[Terms, Terms]:
    logits_NV = logits_BTV.flatten(0, 1).index_select(0, batch.places).float()
    targets_N = batch.targets.reshape(-1)[batch.places]
    total = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=smoothing)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        n_right = (logits_NV.argmax(dim=1) == targets_N).float().sum()
    return {"loss": (total, "targets")}, {"nll": (nll, "targets"), "accuracy": (n_right, "targets")}
