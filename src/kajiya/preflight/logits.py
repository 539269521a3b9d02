"""What a model says of a batch, whatever its kind, before any loss."""

from typing import Any

import torch

from kajiya.config.schema import Config
from kajiya.config.tables import loss_row
from kajiya.data.batch import Batch, Seq2SeqBatch
from kajiya.models.hidden import all_logits
from kajiya.models.outputs import masked_logits, seq2seq_logits, sequence_logits
from kajiya.preflight.portion import dense_windows


def batch_logits(model: Any, batch: Any, config: Config) -> torch.Tensor:
    """Logits of the tokens (of rows with whole examples those of a portion), or the head's outputs for each sequence; float32."""
    if isinstance(batch, Seq2SeqBatch):
        return seq2seq_logits(model, batch).float()
    if loss_row(config.train.loss.name).task in ("classes", "score"):
        return sequence_logits(model, batch).float()
    rows = batch if isinstance(batch, Batch) else dense_windows(batch.rows)
    return (all_logits(model, rows) if rows.is_causal else masked_logits(model, rows)).float()
