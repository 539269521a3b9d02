"""The paged key-value cache in torch, and the attention that reads it through Transformers' interface.

Shape letters: R sequences of one token each, N query heads, K key heads, T tokens of the step, L cached positions, H head
width, S slots (blocks × positions of a block).
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Span:
    """A chunk of a sequence in the flat step: columns `first … first+count−1`, which see `slots` [L] up to their own place."""

    first: int
    count: int
    start: int
    slots: torch.Tensor


@dataclass
class Place:
    """Where the tokens of the present forward pass go and what they see; one object shared by all layers."""

    n_slots: int
    slots: torch.Tensor
    """Where each token of the step is written [T]."""
    singles: torch.Tensor
    """Columns [R] of the sequences that read one token."""
    tables: torch.Tensor
    """Their slots [R, L], padded."""
    mask: torch.Tensor
    """Which of those are no padding [R, 1, 1, L]."""
    spans: tuple[Span, ...] = ()


class _PagedLayer(CacheLayerMixin):
    """Keys and values of one layer: [S, K, H]."""

    is_compileable = False
    is_sliding = False

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not empty memory: what is masked is multiplied by zero, which a NaN would survive.
        _, n_heads, _, width = key_states.shape
        self.keys = key_states.new_zeros((self.place.n_slots, n_heads, width))
        self.values = value_states.new_zeros((self.place.n_slots, value_states.shape[1], value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new [1, K, T, H]; returns the whole [S, K, H], from which the attention takes what it needs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(0, self.place.slots, key_states[0].transpose(0, 1))
        self.values.index_copy_(0, self.place.slots, value_states[0].transpose(0, 1))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.place.n_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class PagedCache(Cache):
    """Blocks of every layer. `attention` is the name under which Transformers finds the attention over this cache."""

    def __init__(self, n_blocks: int, block_tokens: int, n_layers: int) -> None:
        none = torch.empty(0, dtype=torch.long)
        self.block_tokens = block_tokens
        self.place = Place(n_blocks * block_tokens, none, none, none, torch.empty(0))
        self._layers = [_PagedLayer(self.place) for _ in range(n_layers)]
        self.attention = f"kajiya_paged_{next(_NUMBERS)}"
        AttentionInterface.register(self.attention, _Attention(self.place))
        super().__init__(layers=[*self._layers])

    @torch.inference_mode()
    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in every layer."""
        size = self.block_tokens
        for tensor in self._tensors():
            tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]

    @torch.inference_mode()
    def clear(self, blocks: list[int]) -> None:
        """Zero blocks, whose content may not be finite."""
        for tensor in self._tensors():
            for block in blocks:
                tensor[block * self.block_tokens : (block + 1) * self.block_tokens] = 0

    def _tensors(self) -> list[torch.Tensor]:
        found = [tensor for layer in self._layers for tensor in (layer.keys, layer.values)]
        return [tensor for tensor in found if tensor is not None]


class _Attention:
    """Attention of the flat query [1, N, T, H] over the cache; returns [1, T, N, H]."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        place = self._place
        query_TNH = query[0].transpose(0, 1)
        result_TNH = query_TNH.new_empty((*query_TNH.shape[:2], value.shape[-1]))
        if len(place.singles):
            query_RN1H = query_TNH[place.singles].unsqueeze(2)
            keys, values = key[place.tables].transpose(1, 2), value[place.tables].transpose(1, 2)
            mask = _within(place.mask, sliding_window)
            found = _attend(query_RN1H, keys, values, mask, scaling, softcap)
            result_TNH[place.singles] = found.squeeze(2)
        for span in place.spans:
            columns = slice(span.first, span.first + span.count)
            keys, values = key[span.slots].transpose(0, 1), value[span.slots].transpose(0, 1)
            positions = torch.arange(span.start, span.start + span.count, device=query.device)
            mask = torch.arange(len(span.slots), device=query.device) <= positions[:, None]
            mask = _within(mask, sliding_window)
            found = _attend(query_TNH[columns].transpose(0, 1)[None], keys[None], values[None], mask, scaling, softcap)
            result_TNH[columns] = found[0].transpose(0, 1)
        return result_TNH[None], None


def _within(mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """Of the positions that a token sees, all [..., L] up to its own one, the last `window`."""
    if window is None:
        return mask
    end = mask.sum(-1, keepdim=True)
    return mask & (torch.arange(mask.shape[-1], device=mask.device) >= end - window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    cap: float | None,
) -> torch.Tensor:
    """Attention; with a `cap`, scores are cap · tanh(score / cap)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if cap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = cap * torch.tanh(query @ key.transpose(-1, -2) * (scale / cap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value
