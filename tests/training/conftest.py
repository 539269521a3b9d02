"""A tiny model and batches with masked targets, several segments a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.config.schema import ModelConfig
from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch, Seq2SeqBatch
from kajiya.models.build import Vocabulary, build_model

VOCABULARY = Vocabulary(97, 0, 1, 2)


def make_model(seed: int = 0, **settings: object) -> torch.nn.Module:
    """A Llama of a few thousand parameters, float32."""
    sizes = {"n_params": None, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48}
    return build_model(ModelConfig(**{**sizes, "max_positions": 64, **settings}), VOCABULARY, seed).module.train()  # type: ignore[arg-type]


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(seed=0, **model settings)`: `make_model`."""
    return make_model


def make_batch(rows: int, tokens: int = 16, seed: int = 0, keep: float = 0.7) -> Batch:
    """Random ids; about `keep` of the targets are learnt from; each row has a boundary of documents at a random place."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY.size, (rows, tokens + 1), generator=generator)
    cut = torch.randint(1, tokens, (rows, 1), generator=generator)
    place = torch.arange(tokens).expand(rows, tokens)
    segments = (place >= cut).long()
    positions = torch.where(segments == 1, place - cut, place)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) > keep] = NO_TARGET
    targets[place == cut - 1] = NO_TARGET
    return Batch(ids[:, :-1].contiguous(), targets, positions, segments, int((targets != NO_TARGET).sum()))


Sequence = tuple[list[int], int]
"""Token ids and how many of them are the prompt, whose tokens are no targets."""


def random_sequences(n: int, seed: int = 0, shortest: int = 4, longest: int = 11) -> list[Sequence]:
    """Sequences of random ids and lengths, each with a prompt of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    lengths = [number(shortest, longest) for _ in range(n)]
    return [([number(3, VOCABULARY.size - 1) for _ in range(length)], number(1, 3)) for length in lengths]


def make_examples(sequences: list[Sequence], k: int, per_row: int = 2, **more: torch.Tensor | None) -> ExampleBatch:
    """Examples of `k` sequences each, `per_row` examples packed into a row, which is then filled up with 0."""
    n_examples = len(sequences) // k
    rows = [range(first, min(first + per_row, n_examples)) for first in range(0, n_examples, per_row)]
    width = max(sum(len(sequences[e * k + j][0]) - 1 for e in row for j in range(k)) for row in rows) + 3
    tokens, positions, segments = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    targets, owner = torch.full_like(tokens, NO_TARGET), torch.full_like(tokens, -1)
    last = torch.zeros(len(sequences), dtype=torch.int64)
    for number, row in enumerate(rows):
        place = 0
        for segment, sequence in enumerate(e * k + j for e in row for j in range(k)):
            ids, n_prompt = sequences[sequence]
            n = len(ids) - 1
            part = slice(place, place + n)
            tokens[number, part] = torch.tensor(ids[:-1])
            targets[number, part] = torch.tensor([NO_TARGET] * (n_prompt - 1) + ids[n_prompt:])
            positions[number, part] = torch.arange(n)
            segments[number, part] = segment
            owner[number, part] = sequence
            place += n
            last[sequence] = number * width + place - 1
        segments[number, place:] = segments[number, place - 1] + 1
        positions[number, place:] = torch.arange(width - place)
    packed = Batch(tokens, targets, positions, segments, int((targets != NO_TARGET).sum()))
    return ExampleBatch(packed, owner, last, torch.arange(n_examples), **more)  # type: ignore[arg-type]


def make_pairs_of_text(rows: int, seed: int = 0) -> Seq2SeqBatch:
    """Inputs and targets of random ids; the decoder begins with id 0."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(3, VOCABULARY.size, (rows, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(4, 10, (rows, 1), generator=generator)
    targets = torch.randint(3, VOCABULARY.size, (rows, 7), generator=generator)
    targets[torch.arange(7) >= torch.randint(3, 8, (rows, 1), generator=generator)] = NO_TARGET
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), targets[:, :-1].clamp_min(0)], dim=1)
    return Seq2SeqBatch(inputs, mask, tokens, targets, int((targets != NO_TARGET).sum()))


def make_rollouts(
    n_prompts: int, seed: int = 0, k: int = 3, old: bool = False, reference: bool = False
) -> RolloutBatch:
    """Answers of random ids to `n_prompts` prompts, with random advantages; log-probabilities drawn near −ln V."""
    sequences = random_sequences(n_prompts * k, seed)
    rows = make_examples(sequences, k=1, per_row=1).rows
    generator = torch.Generator().manual_seed(seed)
    is_target = (rows.targets != NO_TARGET).float()

    def table() -> torch.Tensor:
        return (-4.5 + 0.5 * torch.randn(rows.targets.shape, generator=generator)) * is_target

    rewards = torch.randint(0, 2, (n_prompts * k, 2), generator=generator).float()
    return RolloutBatch(
        rows=rows,
        sampled=table(),
        advantages=torch.randn(n_prompts * k, generator=generator),
        rewards=torch.cat([rewards.sum(dim=1, keepdim=True), rewards], dim=1),
        names=("one", "two"),
        group_size=k,
        is_cut=torch.rand(n_prompts * k, generator=generator) < 0.5,
        old=table() if old else None,
        reference=table() if reference else None,
    )


class ListLoader:
    """Batches of a list, again and again; the position is an index."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.index = 0

    def next(self) -> Any:
        self.index += 1
        return self.batches[(self.index - 1) % len(self.batches)]

    def heaviest(self) -> Any:
        return max(self.batches, key=lambda batch: batch.n_tokens)

    def state(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state(self, state: dict[str, int]) -> None:
        self.index = state["index"]


class NoTokenizer:
    """Stands where a tokenizer is saved beside a model, and saves nothing."""

    def save_pretrained(self, folder: Path) -> None:
        """There is none in these tests."""
