"""Log-probabilities of whole sequences in packed rows, for the losses that compare them.

Shape letters: B rows, T tokens of a row, N tokens flattened, D hidden width, V vocabulary, E examples, S sequences.
"""

from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch
from kajiya.errors import TrainingError
from kajiya.evals.scoring import evaluation_mode
from kajiya.models.adapt import adapter_off, has_adapter
from kajiya.models.hidden import all_logits, has_split_head, hidden_at, last_hidden
from kajiya.run.deferred import uncompiled
from kajiya.training.cross_entropy import chunked_log_probs


def split_head(model: Any, batch: Batch, places_n: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [N, D] and the head [V, D], both in the dtype that their product is computed in.

    With `places_n`, ascending, the states are those of these places of the flattened rows alone, [n, D].
    """
    hidden = last_hidden(model, batch) if places_n is None else hidden_at(model, batch, places_n)
    head = model.get_output_embeddings().weight
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    return hidden.reshape(-1, hidden.shape[-1]).to(dtype), head.to(dtype)


def token_log_probs(model: Any, batch: Batch, chunk_tokens: int) -> torch.Tensor:
    """log p of each target, nats, float32 [B, T], 0 where there is none; all logits are never held at once."""
    targets_N = batch.targets.reshape(-1)
    if has_split_head(model):
        wanted_n = batch.places
        hidden_nD, head_VD = split_head(model, batch, wanted_n)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            values_n = chunked_log_probs(hidden_nD, head_VD, targets_N[wanted_n], chunk_tokens, all_wanted=True)
        result_N = values_n.new_zeros(targets_N.shape).index_copy(0, wanted_n, values_n)
    else:
        logits_NV = all_logits(model, batch).flatten(0, 1).float()
        result_N = -torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=NO_TARGET, reduction="none")
    return result_N.view_as(batch.targets)


def sequence_log_probs(model: Any, batch: ExampleBatch, chunk_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ weight · log p over the targets of each sequence, nats, and Σ weight; both float32 [S]. Weights are 1 unless given."""
    rows = batch.rows
    values_BT = token_log_probs(model, rows, chunk_tokens)
    weights_BT = (rows.targets != NO_TARGET).to(values_BT.dtype)
    if rows.weights is not None:
        weights_BT = weights_BT * rows.weights
    # What belongs to no sequence is owned by −1, and added up before the first.
    owner_N = batch.owner.reshape(-1) + 1
    zeros = values_BT.new_zeros(1 + len(batch.last))
    sums, lengths = (zeros.index_add(0, owner_N, each.reshape(-1)) for each in (values_BT * weights_BT, weights_BT))
    return sums[1:], lengths[1:]


def reference_log_probs(model: Any, batch: ExampleBatch, chunk_tokens: int) -> torch.Tensor:
    """Σ log p of each sequence under the reference model, nats, float32 [S], without gradient.

    Those that came with the batch, computed once before training; without them, those of the model's base: its adapter is
    turned off for a forward pass.
    """
    if batch.reference is not None:
        return batch.reference
    if not has_adapter(model):
        raise TrainingError(
            "this loss compares with a reference model, and the batch brings no log-probabilities of one"
        )
    # Compiled blocks would be compiled anew each time that the adapter goes off and on.
    with torch.no_grad(), evaluation_mode(model), adapter_off(model), uncompiled():
        return sequence_log_probs(model, batch, chunk_tokens)[0]
