"""A tiny model and batches with masked targets, several segments a row."""

from collections.abc import Callable

import pytest
import torch

from kajiya.config.schema import ModelConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.models.build import Vocabulary, build_model

VOCABULARY = Vocabulary(97, 0, 1, 2)


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(seed=0, **model settings)`: a Llama of a few thousand parameters, float32."""

    def make(seed: int = 0, **settings: object) -> torch.nn.Module:
        sizes = {"n_params": None, "hidden_size": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48}
        return build_model(ModelConfig(**{**sizes, "max_positions": 64, **settings}), VOCABULARY, seed).module.train()  # type: ignore[arg-type]

    return make


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


class ListLoader:
    """Batches of a list, again and again; the position is an index."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.index = 0

    def next(self) -> Batch:
        self.index += 1
        return self.batches[(self.index - 1) % len(self.batches)]

    def state(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state(self, state: dict[str, int]) -> None:
        self.index = state["index"]
