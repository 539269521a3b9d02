"""Who answers a task: a model of this machine, by the engine that serves; `kajiya.evals.endpoint` has those behind an API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kajiya.errors import DataError

_PRECISION = _DEVICE = "auto"


@dataclass(frozen=True)
class Answer:
    """One row of a task, and what came of it."""

    row: Mapping[str, Any]
    prompt: str
    target: str
    texts: tuple[str, ...] = ()
    """Scored answers, one a sample."""
    choices: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Log-probability of each choice, nats."""
    n_bytes: tuple[int, ...] = ()
    """Bytes of each choice."""
    vectors: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)
    """Embeddings of prompt and target."""

    @property
    def text(self) -> str:
        """The first answer."""
        return self.texts[0]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_tokens: int
    temperature: float
    seed: int
    samples: int
    stop: tuple[str, ...]
    is_chat: bool


class Respondent(Protocol):
    """What a task needs of a model."""

    @property
    def engine(self) -> str:
        """What computes the answers."""

    def dtype(self, kind: str) -> str:
        """Precision in which a task of that kind is computed."""

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[tuple[str, ...]]:
        """`sampling.samples` answers to each prompt."""

    def choose(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        """Log-probability of each choice behind its prompt, nats."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, float32 [n, d]."""


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(ends)] if ends else text


class LocalModel:
    """The model in a folder; weights are loaded when they are first needed."""

    engine = "torch"

    def __init__(self, folder: Path, batch: int) -> None:
        self.folder = folder
        self.batch = batch

    def dtype(self, kind: str) -> str:
        """Given texts are scored in the precision of the weights on the disk; the engine picks its own for all else."""
        from kajiya.models.open import model_dtype
        from kajiya.serving.loading import pick_device, pick_dtype

        found = model_dtype(self.folder) if kind == "choose" else pick_dtype(_PRECISION, pick_device(_DEVICE))
        return str(found).removeprefix("torch.")

    @cached_property
    def _engine(self) -> Any:
        from kajiya.serving.loading import load_engine

        return load_engine(
            self.folder, precision=_PRECISION, device=_DEVICE, max_batch=self.batch, max_waiting=self.batch
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from kajiya.data.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[tuple[str, ...]]:
        """By the engine that serves; a text longer than the context keeps its end, a conversation is refused (`DataError`)."""
        from kajiya.serving.sequence import SamplingParams

        room = self._engine.context_tokens - sampling.max_tokens - 1
        if room < 1:
            raise DataError(
                f"max_tokens={sampling.max_tokens} fills the context of {self._engine.context_tokens} tokens"
            )
        ids = [self._ids(prompt, sampling.is_chat, room) for prompt in prompts for _ in range(sampling.samples)]
        params = SamplingParams(max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed)
        found = [
            cut_at(self._tokenizer.decode(each.token_ids, skip_special_tokens=True), sampling.stop)
            for each in self._engine.generate(ids, params)
        ]
        n = sampling.samples
        return [tuple(found[i : i + n]) for i in range(0, len(found), n)]

    def _ids(self, prompt: str, is_chat: bool, room: int) -> list[int]:
        from kajiya.data.chat import render_chat
        from kajiya.data.tokenizer import start_id
        from kajiya.data.values import excerpt

        if is_chat:
            ids = render_chat(self._tokenizer, [{"role": "user", "content": prompt}], True)
            if len(ids) > room:
                # Cut, it would lose its begin-of-text and the head of its turn.
                raise DataError(
                    f"a question of {len(ids):,} tokens leaves no room in the model's context, which has {room:,} beside the "
                    f"answer: {excerpt(prompt, 80)}\nLower the task's max_tokens, or take rows that are shorter."
                )
            return ids
        return [start_id(self._tokenizer), *self._encode(prompt)[-(room - 1) :]]

    def _encode(self, text: str) -> list[int]:
        from kajiya.data.encode import encode_texts, open_encoder

        return [int(token) for token in encode_texts(open_encoder(self.folder), [text])[0]]

    def choose(self, prompts: Sequence[str], choices: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
        """Σ log p over the tokens of each choice; the choice is encoded by itself, as it would be written."""
        from kajiya.data.tokenizer import start_id
        from kajiya.evals.scoring import score_continuations

        start = start_id(self._tokenizer)
        pairs = [
            ([start, *self._encode(prompt)], self._encode(choice))
            for prompt, row in zip(prompts, choices, strict=True)
            for choice in row
        ]
        found = score_continuations(self.model, pairs, context_tokens=self.context_tokens, batch=self.batch)
        scores = iter(each.logprob for each in found)
        return [tuple(next(scores) for _ in row) for row in choices]

    @cached_property
    def model(self) -> Any:
        """The plain model, for scores, an adapter added to its base; on a GPU where there is one."""
        from kajiya.models.adapter_files import is_adapter, is_mergeable
        from kajiya.models.open import model_dtype, open_model
        from kajiya.serving.loading import pick_device

        is_merged = is_adapter(self.folder) and is_mergeable(self.folder)
        return open_model(self.folder, model_dtype(self.folder), is_merged=is_merged).to(pick_device(_DEVICE))

    @property
    def context_tokens(self) -> int:
        """Longest sequence that the model is declared for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Means of last hidden states, by the engine."""
        limit = self._engine.context_tokens
        return np.array([self._engine.embed(self._ids(text, False, limit)) for text in texts], dtype=np.float32)
