"""The model in training as the engine that serves draws from it: its weights are handed over in memory, by version."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from kajiya.models.merged import merged_tensors
from kajiya.serving.engine import Engine
from kajiya.serving.loading import EngineOptions, end_tokens, engine_of
from kajiya.serving.sequence import Completion, SamplingParams

_AT_ONCE = 64
"""Answers that are drawn together."""
_BLOCK = 16


class Policy:
    """An engine over a plain copy of the model; `renew` gives it the weights as they are, the adapter merged into them."""

    def __init__(self, model: Any, vocabulary: Any, most_tokens: int, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.version = 0
        """Times that weights were handed over; the prefix cache's keys hold it."""
        self.end_ids = end_tokens(vocabulary, model)
        """Tokens that end an answer, as they do where the model is served."""
        self._most_tokens = most_tokens
        self._engine: Engine | None = None

    def renew(self) -> None:
        """Hand the present weights over; what was cached under others is forgotten."""
        self.version += 1
        tensors = merged_tensors(self.model, self.dtype)
        if self._engine is None:
            self._engine = self._open(tensors)
        else:
            self._engine.set_weights(tensors, self.version)

    def draw(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int, stop_ids: tuple[int, ...]
    ) -> list[Completion]:
        """An answer to each prompt from the model's own distribution, which its seed alone chooses."""
        assert self._engine is not None, "no weights were handed over yet"
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_ids)
        return self._engine.generate([list(ids) for ids in prompts], params, seeds=seeds)

    def _open(self, tensors: dict[str, torch.Tensor]) -> Engine:
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.model.config)
        head, table = tensors.get("lm_head.weight"), self.model.get_input_embeddings().weight
        config.tie_word_embeddings = bool(config.tie_word_embeddings) and (
            head is None or torch.equal(head, table.detach().to(head))
        )
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            plain: Any = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="eager")
        plain.load_state_dict(tensors, strict=not config.tie_word_embeddings)
        tokens = -(-(self._most_tokens + 1) // _BLOCK) * _BLOCK
        options = EngineOptions(max_batch=_AT_ONCE, max_waiting=_AT_ONCE, cache_tokens=_AT_ONCE * tokens)
        return engine_of(plain.eval().to(device), self.end_ids, options)
