"""Attention for packed rows: torch's SDPA with documents kept apart, entered through Transformers' attention interface.

Shape letters: B rows, N query heads, K key heads, T tokens, H head width.
"""

from typing import Any

import torch
from torch.nn import functional

from kajiya.data.batch import is_on_host
from kajiya.models.fused_products import attention
from kajiya.models.tasks import CAUSAL, Task, auto_class
from kajiya.models.unequal import by_bounds, takes_bounds

PACKED_SDPA = "kajiya_packed_sdpa"
"""Name under which Transformers finds `packed_sdpa`; it builds no mask of its own for it."""
PADDED_SDPA = "kajiya_padded_sdpa"
"""Name of Transformers' own sdpa with a mask that is made without a question to the device (`_padded_mask`)."""


def register_packed_sdpa() -> None:
    """Make `packed_sdpa` known to Transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_SDPA, packed_sdpa)


def register_padded_sdpa() -> None:
    """Make `PADDED_SDPA` known to Transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(PADDED_SDPA, sdpa_attention_forward)
    AttentionMaskInterface.register(PADDED_SDPA, _padded_mask)


def _padded_mask(**given: Any) -> torch.Tensor | None:
    """Transformers' mask for sdpa. To leave it out where no token is padding, the host would have to wait for a GPU."""
    from transformers.masking_utils import sdpa_mask

    padding = given["attention_mask"]
    if padding is not None and not is_on_host(padding):
        given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**given)  # type: ignore[no-any-return]


def attention_name(wanted: str, architecture: Any, task: Task = CAUSAL) -> str:
    """The implementation that Transformers is told: `packed_sdpa` for sdpa, eager where the architecture has no sdpa.

    Models that read both ways, or a whole text at once, get masks of Transformers' own making and its sdpa.
    """
    if wanted == "flex_attention":
        import torch._dynamo  # noqa: F401 (it compiles by itself, which `uncompiled` must know)
    if wanted != "sdpa":
        return wanted
    known: Any = auto_class(task)._model_mapping
    if type(architecture) in known and not known[type(architecture)]._supports_sdpa:
        return "eager"
    if task.name != "causal":
        if type(architecture) not in known or not known[type(architecture)]._can_set_attn_implementation():
            return "sdpa"
        register_padded_sdpa()
        return PADDED_SDPA
    register_packed_sdpa()
    return PACKED_SDPA


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of query [B, N, T, H] over key and value [B, K, T, H]; returns [B, T, N, H].

    `attention_mask` is `None` (plain causal), the first key that each query sees, int32 [B, 1, 1, T] (`first_keys`), or a boolean
    [B, 1, T, T] that is true where a query may look (`segment_mask`). A length-1 query with a longer key is one decoding step
    and sees all of the keys. First keys go to the C++ operator, which holds no scores, where it takes these heads; on a GPU, where
    `cu_seq_lens_q` comes with them, to torch's kernel for sequences of unequal length.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"packed_sdpa has no {unknown[0]}; set model.attention=eager for this architecture")
    window = kwargs.get("sliding_window")
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        first_BT = attention_mask[:, 0, 0]
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is not None and not dropout and takes_bounds(query, key, value):
            return by_bounds(query, key, value, bounds, scaling, window), None
        if not dropout and _takes(query, key, value):
            if window is not None:
                first_BT = first_BT.maximum(window_starts(first_BT, window))
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attention(query, key, value, first_BT.contiguous(), scale), None
        attention_mask = seen_from(first_BT)
    if window is not None and query.shape[2] > 1 and key.shape[2] > window:
        attention_mask = _windowed(attention_mask, query.shape[2], key.shape[2], window, query.device)
    result = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and query.shape[2] > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result.transpose(1, 2).contiguous(), None


def _takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    from kajiya.models.native.operators import attention_fits

    return not torch.is_autocast_enabled(query.device.type) and attention_fits(query, key, value)


def window_starts(first_BT: torch.Tensor, window: int) -> torch.Tensor:
    """The first token within each query's window, int32 [T]."""
    tokens = torch.arange(first_BT.shape[1], dtype=torch.int32, device=first_BT.device)
    return (tokens - (window - 1)).clamp_min(0)


def _windowed(
    mask: torch.Tensor | None, n_queries: int, n_keys: int, window: int, device: torch.device
) -> torch.Tensor:
    """The mask, or the plain causal one, without what lies `window` tokens or more behind the query."""
    query_T1 = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key_1T = torch.arange(n_keys, device=device)[None, :]
    near = (key_1T <= query_T1) & (query_T1 - key_1T < window)
    return near if mask is None else mask & near


def first_keys(segments: torch.Tensor) -> torch.Tensor:
    """Where the segment of each token begins in its row: the first key that it sees, int32 [B, 1, 1, T].

    It stands for a mask, in whose place architectures pass it on; `packed_sdpa` alone understands it.
    """
    tokens = torch.arange(segments.shape[1], dtype=torch.int32, device=segments.device).expand_as(segments)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], tokens[:, 1:], 0)
    return begins.cummax(dim=1).values[:, None, None, :]


def seen_from(first_BT: torch.Tensor) -> torch.Tensor:
    """Boolean [B, 1, T, T], true where token i may look at token j: first[i] ≤ j ≤ i."""
    tokens = torch.arange(first_BT.shape[1], device=first_BT.device)
    return ((tokens[None, None, :] >= first_BT[:, :, None]) & (tokens[None, :] <= tokens[:, None])).unsqueeze(1)


def segment_mask(segments: torch.Tensor) -> torch.Tensor | None:
    """Boolean [B, 1, T, T], true where token i may look at token j: same segment and j ≤ i; `None` when no row has two segments.

    `segments` is int64 [B, T]. `None` lets the kernel use its faster plain causal path.
    """
    if not bool((segments != segments[:, :1]).any()):
        return None
    return visible(segments)


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Boolean [B, 1, T, T], true where token i may look at token j: same segment and j ≤ i."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril().unsqueeze(1)
