"""A model's weights, packed for the C++ decoder, with its paged cache.

Shape letters: N outputs, K inputs, P positions, R rotary width, V vocabulary, D width.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from kajiya.errors import ConfigError
from kajiya.serving.native import layout
from kajiya.serving.native.architecture import FAMILIES, Architecture, Rotary
from kajiya.serving.native.build import load_library
from kajiya.serving.native.memory import Arena

_FIRST_POSITIONS = 512
_FIRST_CACHE_BYTES = 256 << 20
"""Of the cache, what is had at hand from the start: blocks are first taken in order."""


class NativeModel:
    """Packed weights and cache. `tensors` are named as in the Transformers model's `state_dict`."""

    def __init__(
        self, config: Architecture, rotaries: Mapping[str, Rotary], weights: str, cache: str, n_blocks: int
    ) -> None:
        self._library = load_library()
        self.config = config
        self.family = FAMILIES[config.model_type]
        self.weights = weights
        self._rotaries = rotaries
        self._arena = Arena()
        self._kept: dict[str, Any] = {}
        self.layers = (layout.Layer * config.num_hidden_layers)()
        self.model = layout.Model(
            n_layers=config.num_hidden_layers,
            width=config.hidden_size,
            n_query=config.num_attention_heads,
            n_key=config.num_key_value_heads,
            head_width=config.head_dim,
            gate=layout.GATES[config.gate],
            mlp_width=config.intermediate_size,
            vocab=config.vocab_size,
            cache_kind=layout.CACHE_KINDS[cache],
            weight_kind=layout.KINDS[weights],
            epsilon=config.rms_norm_eps,
            attention_scale=config.attention_scale,
            embedding_scale=config.embedding_scale,
            score_cap=config.score_cap or 0.0,
            logit_cap=config.logit_cap or 0.0,
            layers=self.layers,
        )
        for layer, window in zip(self.layers, config.windows, strict=True):
            layer.window = window or 0
        self.reach(_FIRST_POSITIONS)
        self._reserve_cache(cache, n_blocks, config.head_dim)

    # ---------------------------------------------------------------- weights

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pack these weights in place of the present ones."""
        table = tensors["model.embed_tokens.weight"]
        table = table.detach().to(torch.float32 if self.weights == "fp32" else torch.bfloat16).contiguous()
        self._kept["embedding"] = table
        self.model.embedding = table.data_ptr()
        self.model.embedding_kind = 0 if table.dtype == torch.float32 else 1
        self.model.final_norm = self._norm("norm", tensors["model.norm.weight"])
        head = tensors["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"]
        self.model.head = self._linear("head", [head], [None])
        for number, layer in enumerate(self.layers):
            self._load_layer(number, layer, tensors)

    def _load_layer(self, number: int, layer: layout.Layer, tensors: Mapping[str, torch.Tensor]) -> None:
        prefix = f"model.layers.{number}."
        for field, name in self.family.norms.items():
            weight = tensors.get(f"{prefix}{name}.weight")
            if weight is not None:
                setattr(layer, field, self._norm(f"{number}.{field}", weight))
        for field, names in self.family.parts.items():
            matrices = [tensors[f"{prefix}{name}.weight"] for name in names]
            biases = [tensors.get(f"{prefix}{name}.bias") for name in names]
            setattr(layer, field, self._linear(f"{number}.{field}", matrices, biases))

    def _norm(self, key: str, weight: torch.Tensor) -> int:
        return self._floats(key, weight.detach().float() + self.family.shift)

    def _floats(self, key: str, tensor: torch.Tensor) -> int:
        kept = tensor.detach().float().contiguous().clone()
        self._kept[key] = kept
        return kept.data_ptr()

    def _linear(self, key: str, matrices: list[torch.Tensor], biases: list[torch.Tensor | None]) -> layout.Linear:
        """The matrices [N, K], one under the other, packed into memory that stays where it is when weights change."""
        matrix = torch.cat([one.detach() for one in matrices]).float().contiguous()
        n_out, n_in = matrix.shape
        kind = layout.KINDS[self.weights]
        if f"{key}.packed" not in self._kept:
            size = self._library.kajiya_packed_bytes(kind, n_out, n_in)
            panels, groups = -(-n_out // layout.PANEL), -(-n_in // layout.GROUP)
            self._kept[f"{key}.packed"] = self._arena.take(size)
            n_scales = panels * groups * layout.PANEL if self.weights in ("int8", "int4") else 0
            self._kept[f"{key}.scales"] = self._arena.take(2 * n_scales)
        packed, scales = self._kept[f"{key}.packed"], self._kept[f"{key}.scales"]
        self._library.kajiya_pack(matrix.data_ptr(), kind, n_out, n_in, packed, scales, torch.get_num_threads())
        bias = None
        if any(one is not None for one in biases):
            parts = [
                torch.zeros(rows.shape[0]) if one is None else one.detach().float()
                for rows, one in zip(matrices, biases, strict=True)
            ]
            bias = self._floats(f"{key}.bias", torch.cat(parts))
        return layout.Linear(kind=kind, n_out=n_out, n_in=n_in, weights=packed, scales=scales, bias=bias)

    # ---------------------------------------------------------------- positions and cache

    def reach(self, n_positions: int) -> None:
        """Have the rotation of the first `n_positions` positions at hand."""
        if n_positions <= self.model.max_positions:
            return
        n_positions = max(n_positions, min(2 * self.model.max_positions, self.config.max_position_embeddings))
        for name, rotary in self._rotaries.items():
            with torch.inference_mode():
                found = rotary(torch.zeros(1), torch.arange(n_positions).unsqueeze(0))
            cos_PR, sin_PR = (values[0].float().contiguous() for values in found)
            self._kept[f"{name}angles"] = cos_PR, sin_PR
            for layer, rotation in zip(self.layers, self.config.rotations, strict=True):
                if rotation == name:
                    layer.cos, layer.sin, layer.rotary = cos_PR.data_ptr(), sin_PR.data_ptr(), cos_PR.shape[-1]
        self.model.max_positions = n_positions

    def _reserve_cache(self, cache: str, n_blocks: int, head_width: int) -> None:
        padded = -(-head_width // 16) * 16
        cells = n_blocks * self.model.n_key * layout.BLOCK_TOKENS
        widths = {"fp32": 4, "bf16": 2, "int8": 1}
        size = cells * padded * widths[cache]
        try:
            for layer in self.layers:
                layer.cache.keys = self._arena.take(size)
                layer.cache.values = self._arena.take(size)
                if cache == "int8":
                    layer.cache.key_scales = self._arena.take(cells * 4)
                    layer.cache.value_scales = self._arena.take(cells * 4)
        except (OSError, OverflowError) as error:
            n_tokens = n_blocks * layout.BLOCK_TOKENS
            problem = f"there is no memory for the keys and values of {n_tokens} tokens: {error}"
            raise ConfigError("serve.cache_tokens", problem, "Set it lower.") from error
        first = min(size, _FIRST_CACHE_BYTES // (2 * len(self.layers)))
        self._arena.populate([(at, first) for layer in self.layers for at in (layer.cache.keys, layer.cache.values)])

    def step(self, step: layout.Step) -> None:
        """Compute one step; the cache is written. Raises `MemoryError` where there is no room for its activations."""
        if not self._library.kajiya_step(ctypes.byref(self.model), ctypes.byref(step)):
            raise MemoryError(f"no memory is left for a step of {step.n_tokens} tokens")

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in every layer."""
        self._library.kajiya_copy_block(ctypes.byref(self.model), source, target)
