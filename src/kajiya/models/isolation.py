"""What a model's attention is told so that the segments of a row do not see each other.

Every implementation has a way of its own: torch's SDPA a boolean mask, the C++ operator each token's first key, eager attention
a mask that is added, FlexAttention the blocks to compute, flash attention the sequences' bounds. Where nothing needs to be said,
Transformers finds the segments of a causal row by the positions, which restart in each.

Shape letters: B rows, T tokens of a row.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.config.schema import ModelConfig
from kajiya.data.batch import Batch, Layout, segment_bounds
from kajiya.models.adapter_files import is_adapter
from kajiya.models.attention import PACKED_SDPA, PADDED_SDPA, first_keys, segment_mask, visible
from kajiya.models.load import read_architecture
from kajiya.models.native.library import native_problem
from kajiya.models.unequal import bounds_problem, filled_up


def isolation_inputs(model: Any, batch: Batch, *, is_causal: bool = True) -> dict[str, Any]:
    """Keyword arguments for the forward pass of a model of Transformers; the positions are the caller's to pass.

    `is_causal` is false of a model whose tokens see their whole segment.
    """
    implementation = model.config._attn_implementation
    if implementation.startswith("flash_attention"):
        return sequence_bounds(batch.segments, batch.layout)
    if implementation == PACKED_SDPA:
        return _packed_inputs(model, batch)
    if is_causal:
        return {}
    return {"attention_mask": _TWO_WAY[implementation](batch.segments, model.dtype)}


def _packed_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """What `packed_sdpa` is told: first keys for the C++ operator, bounds besides for the kernel of a GPU, else a mask."""
    segments, layout = batch.segments, batch.layout
    if segments.device.type == "cpu" and native_problem() is None:
        return {"attention_mask": first_keys(segments)}
    if layout is None:
        return {"attention_mask": segment_mask(segments)}
    if not layout.is_split:
        return {"attention_mask": None}
    kind = segments.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    if bounds_problem(segments.device, dtype) is not None:
        return {"attention_mask": visible(segments)}
    return {"attention_mask": first_keys(segments), "cu_seq_lens_q": filled_up(layout.bounds)}


def packed_words(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """How packed rows are read on a GPU where `packed_sdpa` reads them, and why, for the plan; nothing elsewhere."""
    from transformers import PreTrainedModel

    if device.type != "cuda" or not isinstance(model, PreTrainedModel):
        return ""
    if model.config._attn_implementation != PACKED_SDPA:
        return ""
    problem = bounds_problem(device, dtype)
    return "; packed rows by bounds" if problem is None else f"; packed rows under a mask: by bounds, {problem}"


def sequence_bounds(segments: torch.Tensor, layout: Layout | None = None) -> dict[str, Any]:
    """Of segments [B, T], the rows one behind the other: where each segment begins, and the end, int32; and the longest."""
    bounds = segment_bounds(segments) if layout is None else layout.bounds
    longest = int(bounds.diff().max()) if layout is None else layout.longest
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _added_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, T, T]: 0 within a segment, the lowest number elsewhere."""
    apart = segments[:, None, :, None] != segments[:, None, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=segments.device).masked_fill(apart, torch.finfo(dtype).min)


def _boolean_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, T, T]: true within a segment."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def _blocks(segments: torch.Tensor, dtype: torch.dtype) -> Any:
    """The blocks that FlexAttention computes."""
    from torch.nn.attention.flex_attention import create_block_mask

    n_rows, n_tokens = segments.shape

    def same(row: Any, head: Any, query: Any, key: Any) -> Any:
        return segments[row, query] == segments[row, key]

    return create_block_mask(same, n_rows, None, n_tokens, n_tokens, device=str(segments.device))


_TWO_WAY = {"eager": _added_mask, "sdpa": _boolean_mask, PADDED_SDPA: _boolean_mask, "flex_attention": _blocks}


def can_isolate(model: nn.Module) -> bool:
    """Whether the segments of a row can be kept apart in this model.

    A model of Transformers can unless it carries a state from token to token (Mamba, RWKV and their kin), which no mask cuts;
    a module of the user's own if its `forward` takes `segments`.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return not model._is_stateful
    return "segments" in inspect.signature(model.forward).parameters


def architecture_isolates(config: ModelConfig) -> bool:
    """The same, told by the config before there is a model; a module of the user's own counts as one that cannot.

    An adapter's base is not looked into: `kajiya prove` changes a segment and sees whether another moves.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if ":" in config.name:
        return False
    if config.path is not None and is_adapter(Path(config.path)):
        return True
    if config.path is not None:
        architecture = type(read_architecture(config.path, config.revision, config.trust_remote_code))
    elif config.name in CONFIG_MAPPING:
        architecture = CONFIG_MAPPING[config.name]
    else:
        return True
    known: Any = AutoModelForCausalLM._model_mapping
    return architecture not in known or not known[architecture]._is_stateful
