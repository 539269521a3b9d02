"""The key-value cache, one row for each running sequence, and the attention that reads it.

Shape letters: R rows in the batch, N query heads, K key heads, T new tokens of a row, L cached positions, H head width.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from kajiya.serving.slots import Move

SLOT_ATTENTION = "kajiya_slots"
"""Name under which Transformers finds `slot_attention`."""

_FIRST_CAPACITY = 256


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, K, capacity + 1, H]; the last position takes what is written for padding."""

    is_compileable = False
    is_sliding = False

    def __init__(self, place: "_Place") -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (self.place.n_rows, key_states.shape[1], self.place.capacity + 1)
        # Zeros, not empty memory: what is masked is multiplied by zero, which a NaN would survive.
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new [R, K, T, H] and return everything visible to this batch, [R, K, L, H], without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        place = self.place
        self.keys[place.rows_RT, :, place.positions_RT] = key_states.transpose(1, 2)
        self.values[place.rows_RT, :, place.positions_RT] = value_states.transpose(1, 2)
        rows = slice(place.first_row, place.end_row)
        return self.keys[rows, :, : place.visible], self.values[rows, :, : place.visible]

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values, once there are any."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def grow(self, old_capacity: int, capacity: int) -> None:
        """Make room for more positions, the old ones kept."""
        if self.is_initialized:
            self.keys, self.values = (_grown(tensor, old_capacity, capacity) for tensor in self.tensors())

    def drop(self) -> None:
        """Free the memory."""
        self.keys = self.values = None
        self.is_initialized = False

    def get_seq_length(self) -> int:
        return self.place.visible

    def get_max_length(self) -> int:
        return self.place.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.visible, 0


class _Place:
    """Where the tokens of the present forward pass go; one object shared by all layers."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.capacity = _FIRST_CAPACITY
        self.first_row = 0
        self.end_row = 0
        self.visible = 0
        self.rows_RT = torch.empty(0)
        self.positions_RT = torch.empty(0)


class SlotCache(Cache):
    """A cache of `n_rows` rows whose sequences have different lengths; it grows by doubling up to what is needed."""

    def __init__(self, n_rows: int, n_layers: int) -> None:
        self.place = _Place(n_rows)
        self._layers = [_SlotLayer(self.place) for _ in range(n_layers)]
        super().__init__(layers=[*self._layers])

    def aim(self, first_row: int, positions_RT: torch.Tensor, visible: int) -> None:
        """Send the next forward pass to rows `first_row …` at `positions_RT` (−1: padding); `visible` positions are read."""
        self._reserve(visible)
        place = self.place
        n_rows = positions_RT.shape[0]
        device = positions_RT.device
        place.first_row, place.end_row, place.visible = first_row, first_row + n_rows, visible
        place.rows_RT = torch.arange(first_row, first_row + n_rows, device=device)[:, None].expand_as(positions_RT)
        place.positions_RT = torch.where(positions_RT < 0, place.capacity, positions_RT)

    @torch.inference_mode()
    def move(self, move: Move) -> None:
        """Copy one row's cached positions to another row."""
        for keys_or_values in self._tensors():
            keys_or_values[move.target, :, : move.length] = keys_or_values[move.source, :, : move.length]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a row whose content is not finite."""
        for keys_or_values in self._tensors():
            keys_or_values[row] = 0

    def drop(self) -> None:
        """Free the memory of all rows."""
        for layer in self._layers:
            layer.drop()
        self.place.capacity = _FIRST_CAPACITY

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self._layers for tensor in layer.tensors()]

    def _reserve(self, length: int) -> None:
        capacity = self.place.capacity
        if length <= capacity:
            return
        while capacity < length:
            capacity *= 2
        for layer in self._layers:
            layer.grow(self.place.capacity, capacity)
        self.place.capacity = capacity


def _grown(old: torch.Tensor, old_capacity: int, capacity: int) -> torch.Tensor:
    rows, heads, _, width = old.shape
    new = old.new_zeros((rows, heads, capacity + 1, width))
    new[:, :, :old_capacity] = old[:, :, :old_capacity]
    return new


def register_slot_attention() -> None:
    """Make `slot_attention` known to Transformers; calling it again changes nothing."""
    AttentionInterface.register(SLOT_ATTENTION, slot_attention)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of query [R, N, T, H] over key and value [R, K, L, H], `attention_mask` [R, 1, T, L] added to the scores.

    Returns [R, T, N, H].
    """
    rows, n_heads, n_tokens, _ = query.shape
    groups = n_heads // key.shape[1]
    if groups > 1 and n_tokens == 1:
        # One token a row: the query heads that share a key head stand in for tokens, and no key is repeated.
        query = query.reshape(rows, key.shape[1], groups, query.shape[3])
    elif groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    result = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return result.reshape(rows, n_heads, n_tokens, -1).transpose(1, 2).contiguous(), None
