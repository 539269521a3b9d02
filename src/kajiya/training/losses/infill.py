"""Tokens that the model reads around (masked-LM) or from an input (encoder–decoder)."""

from typing import Any

import torch

from kajiya.config.options import MaskedLoss, Seq2SeqLoss
from kajiya.data.batch import NO_TARGET, Batch, Seq2SeqBatch
from kajiya.models.outputs import masked_logits, seq2seq_logits
from kajiya.training.losses import Terms


def masked_lm(model: Any, batch: Batch, options: MaskedLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of each masked token (Devlin et al., BERT, arXiv:1810.04805, section 3.1); metrics `nll`, `accuracy`."""
    return _cross_entropy(masked_logits(model, batch), batch.targets, options.label_smoothing)


def seq2seq(model: Any, batch: Seq2SeqBatch, options: Seq2SeqLoss) -> tuple[Terms, Terms]:
    """Cross-entropy of each token of the target, given the input and those before it; metrics `nll`, `accuracy`."""
    return _cross_entropy(seq2seq_logits(model, batch), batch.targets, options.label_smoothing)


def _cross_entropy(logits_BTV: torch.Tensor, targets_BT: torch.Tensor, smoothing: float) -> tuple[Terms, Terms]:
    wanted_BT = targets_BT != NO_TARGET
    logits_NV, targets_N = logits_BTV[wanted_BT].float(), targets_BT[wanted_BT]
    total = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=smoothing)
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        n_right = (logits_NV.argmax(dim=1) == targets_N).float().sum()
    return {"loss": (total, "targets")}, {"nll": (nll, "targets"), "accuracy": (n_right, "targets")}
