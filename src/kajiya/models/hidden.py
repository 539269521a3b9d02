"""The forward pass up to the last hidden state, for losses and scores that never hold all logits."""

import inspect
from typing import Any

import torch
from torch import nn

from kajiya.data.batch import Batch
from kajiya.models.attention import visible
from kajiya.models.fused import is_fused
from kajiya.models.isolation import isolation_inputs
from kajiya.models.virtual_tokens import virtual_tokens

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Fields of Transformers' configs by which a model changes its head's products (Gemma 2, Cohere, Granite, Falcon-H1); `kajiya
prove` compares the two, so that another does not pass unseen."""


_MOST_PLACES = 0.9
"""Share of all places beyond which leaving the others out gains less than it costs."""


def has_split_head(model: nn.Module) -> bool:
    """Whether the model is one of Transformers' with a decoder and a linear head without bias, whose products are the logits."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    if any(vars(model.config).get(name) not in (None, 1) for name in _CHANGES_LOGITS):
        return False
    head = model.get_output_embeddings()
    if type(head).__name__ == "ModulesToSaveWrapper":
        # PEFT's, around a head that an adapter trains whole: it passes on the attributes of the head in force.
        head = head.original_module
    return isinstance(head, nn.Linear) and head.bias is None and model.base_model is not model


def last_hidden(model: Any, batch: Batch) -> torch.Tensor:
    """Hidden state [B, T, D] before the head, documents of a row isolated from each other."""
    return _of_tokens(model, model.base_model(**forward_inputs(model, batch)).last_hidden_state)


def hidden_at(model: Any, batch: Batch, places_n: torch.Tensor) -> torch.Tensor:
    """Hidden states [n, D] before the head at some places of the flattened rows, ascending, no place twice.

    They are those of `last_hidden`. Of joined blocks the last one makes these alone.
    """
    n_places, n_all = len(places_n), batch.tokens.numel()
    if not 0 < n_places <= _MOST_PLACES * n_all or virtual_tokens(model) is not None or not is_fused(model):
        hidden_ND = last_hidden(model, batch).flatten(0, 1)
        return hidden_ND if n_places == n_all else hidden_ND.index_select(0, places_n)
    hidden: torch.Tensor = model.base_model(**forward_inputs(model, batch), read_places=places_n).last_hidden_state
    assert hidden.shape[:2] == (1, n_places), f"{type(model).__name__} does not pass the places on to its last block"
    return hidden[0]


def all_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of any module: one of Transformers', or a user's own that takes the token ids [B, T].

    A user's own `forward` that has parameters named `positions` or `segments` gets those of the batch too.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return _of_tokens(model, model(**forward_inputs(model, batch)).logits)
    wanted = inspect.signature(model.forward).parameters
    given = {"positions": batch.positions, "segments": batch.segments}
    result = model(batch.tokens, **{name: tensor for name, tensor in given.items() if name in wanted})
    if not isinstance(result, torch.Tensor):
        raise TypeError(
            f"{type(model).__name__}.forward returned {type(result).__name__}; logits [B, T, V] are expected"
        )
    return result


def forward_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a Transformers forward pass for a packed batch."""
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "position_ids": batch.positions, "use_cache": False}
    virtual = virtual_tokens(model)
    if virtual is not None:
        return virtual.inputs(model, inputs, visible(batch.segments))
    return inputs | isolation_inputs(model, batch)


def _of_tokens(model: Any, outputs: torch.Tensor) -> torch.Tensor:
    """Outputs [B, T, …] of the batch's own tokens, without those of virtual ones before them."""
    virtual = virtual_tokens(model)
    return outputs if virtual is None else virtual.strip(outputs)
