"""Forward passes of models that are no decoders of text alone: masked-LM, encoder–decoder, one answer for a whole sequence.

Shape letters: B rows, T tokens of a row, N tokens of the longest input, S sequences, L tokens of the longest, C
outputs, V vocabulary.
"""

import inspect
from typing import Any

import torch

from kajiya.data.batch import Batch, ExampleBatch, Seq2SeqBatch
from kajiya.models.hidden import all_logits
from kajiya.models.isolation import isolation_inputs
from kajiya.models.virtual_tokens import VirtualTokens, virtual_tokens

_POSITIONS_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Architectures whose positions begin behind the padding id."""


def masked_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of a model that reads each token's whole segment."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return all_logits(model, batch)
    given: dict[str, Any] = {"input_ids": batch.tokens}
    if "position_ids" in inspect.signature(model.forward).parameters:
        shift = model.config.pad_token_id + 1 if model.config.model_type in _POSITIONS_BEHIND_PADDING else 0
        given["position_ids"] = batch.positions + shift
    return model(**given, **isolation_inputs(model, batch, is_causal=False)).logits  # type: ignore[no-any-return]


def seq2seq_logits(model: Any, batch: Seq2SeqBatch) -> torch.Tensor:
    """Logits [B, T, V] of an encoder–decoder of Transformers, or of a user's own `forward(inputs, inputs_mask, tokens)`."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return model(batch.inputs, batch.inputs_mask, batch.tokens)  # type: ignore[no-any-return]
    virtual = virtual_tokens(model)
    given: dict[str, Any] = {"input_ids": batch.inputs, "attention_mask": batch.inputs_mask.long()}
    if virtual is not None:
        given = virtual.paired_inputs(model, batch.inputs, batch.inputs_mask)
    return model(**given, decoder_input_ids=batch.tokens, use_cache=False).logits  # type: ignore[no-any-return]


def decoder_start(model: Any) -> int | None:
    """The token that an encoder–decoder's decoder reads first; `None` of any other model."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return None
    start = model.config.decoder_start_token_id
    return int(model.config.pad_token_id if start is None else start)


def named_ends(model: Any) -> set[int] | None:
    """Ids at which the model's own settings end an answer; `None` where it has none."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.generation_config is None:
        return None
    named = model.generation_config.eos_token_id
    return set(named) if isinstance(named, list) else set() if named is None else {int(named)}


def sequence_logits(model: Any, batch: ExampleBatch) -> torch.Tensor:
    """The head's outputs [S, C] for each sequence, or those of a user's own `forward(tokens [S, L], mask [S, L])`.

    The sequences are taken out of their rows and padded, since each architecture pools in a way of its own: what is trained is what
    its `ForSequenceClassification` class computes of the same text anywhere else.
    """
    from transformers import PreTrainedModel

    is_own = not isinstance(model, PreTrainedModel)
    pad_id = None if is_own else model.config.pad_token_id
    tokens_SL, mask_SL = padded_sequences(batch, pad_id or 0)
    if is_own:
        return model(tokens_SL, mask_SL)  # type: ignore[no-any-return]
    virtual = virtual_tokens(model)
    if virtual is not None:
        return _behind_virtual(model, virtual, tokens_SL, mask_SL)
    return model(input_ids=tokens_SL, attention_mask=mask_SL.long()).logits  # type: ignore[no-any-return]


def _behind_virtual(model: Any, virtual: VirtualTokens, tokens_SL: torch.Tensor, mask_SL: torch.Tensor) -> torch.Tensor:
    """The same of a causal model behind virtual tokens."""
    given = virtual.padded_inputs(model, tokens_SL, mask_SL)
    if virtual.is_prefix:
        return model(**given).logits  # type: ignore[no-any-return]
    # Of embeddings the class would take the last place of each row, which is padding in all but the longest.
    hidden_SLD = virtual.strip(model.base_model(**given).last_hidden_state)
    sequences = torch.arange(len(hidden_SLD), device=hidden_SLD.device)
    return model.score(hidden_SLD[sequences, mask_SL.sum(dim=1) - 1])  # type: ignore[no-any-return]


def padded_sequences(batch: ExampleBatch, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences one a row, int64 [S, L], filled up with `pad_id` on the right, and which are tokens, bool [S, L]."""
    n_sequences, length = len(batch.last), batch.longest
    owner_M, place_M = batch.owner.reshape(-1), batch.rows.positions.reshape(-1)
    # What belongs to no sequence goes to one place behind them all: to leave it out, its number would have to be asked for.
    index_M = torch.where(owner_M >= 0, owner_M * length + place_M, n_sequences * length)
    tokens = torch.full((n_sequences * length + 1,), pad_id, dtype=torch.int64, device=owner_M.device)
    mask = torch.zeros(n_sequences * length + 1, dtype=torch.bool, device=owner_M.device)
    tokens.scatter_(0, index_M, batch.rows.tokens.reshape(-1))
    mask.scatter_(0, index_M, True)
    return tokens[:-1].view(n_sequences, length), mask[:-1].view(n_sequences, length)
