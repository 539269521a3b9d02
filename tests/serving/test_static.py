"""Decoding in static shapes, computed as it is on a CPU: the function that a GPU captures."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.serving.engine import Engine, ModelFacts
from kajiya.serving.runner import TransformersRunner
from kajiya.serving.scheduler import Chunk
from kajiya.serving.sequence import Request, SamplingParams, new_sequence

from .conftest import CONTEXT, is_greedy, plain_model


def _engine(reference: Any, is_static: bool, n_blocks: int = 64) -> tuple[Engine, TransformersRunner]:
    runner = TransformersRunner(copy.deepcopy(reference), n_blocks, is_static)
    return Engine(runner, ModelFacts(CONTEXT, 512, frozenset()), 5, 16), runner


def _prompts(lengths: list[int]) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, 512) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("n_blocks", [64, 20])
def test_answers_are_those_of_the_model(reference: Any, n_blocks: int) -> None:
    """In batches of every size up to 5 as sequences come and go, over tables of two sizes; with few blocks, after preemptions."""
    engine, runner = _engine(reference, True, n_blocks)
    prompts = _prompts([1, 30, 7, 100, 64, 150, 12])
    lengths = [70, 60, 50, 40, 30, 40, 10]
    answers: dict[str, list[int]] = {}
    for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add(Request(str(i), tuple(prompt), SamplingParams(max_tokens=n, temperature=0)))
    while not engine.is_idle:
        for output in engine.step():
            assert output.token is not None
            answers.setdefault(output.id, []).append(output.token.token)
    for i, prompt in enumerate(prompts):
        assert len(answers[str(i)]) == lengths[i]
        assert is_greedy(reference, prompt, answers[str(i)]), i
    assert runner.decoder is not None
    assert len({rows for rows, _ in runner.decoder.shapes}) >= 3
    assert {18} == {columns for _, columns in runner.decoder.shapes}
    assert runner.decoder.n_graphs == 0
    assert engine.scheduler.pool.n_free == n_blocks
    assert (engine.scheduler.n_preemptions > 0) == (n_blocks == 20)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2"])
def test_windows_and_bounded_scores_are_those_of_the_model(family_folder: Callable[[str], Path], family: str) -> None:
    model = plain_model(family_folder(family))
    engine, _ = _engine(model, True)
    prompts = _prompts([30, 3, 70])
    found = engine.generate(prompts, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    assert all(is_greedy(model, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))


def test_longer_texts_have_larger_tables_and_padding_touches_no_sequence(reference: Any) -> None:
    config = reference.config.__class__(**reference.config.to_dict() | {"max_position_embeddings": 512})
    torch.manual_seed(3)
    model = reference.__class__(config).eval()
    runner = TransformersRunner(copy.deepcopy(model), 32, is_static=True)
    engine = Engine(runner, ModelFacts(512, 512, frozenset()), 3, 8)
    prompts = _prompts([250, 3, 9])
    found = engine.generate(prompts, SamplingParams(max_tokens=20, temperature=0))
    assert all(is_greedy(model, prompt, one.token_ids) for prompt, one in zip(prompts, found, strict=True))
    assert runner.decoder is not None
    assert runner.decoder.shapes == {(4, 18), (4, 34)}
    # Rows of padding write to the block that no sequence has.
    spare = runner.cache._tensors()[0][32 * 16 :]
    assert spare[0].abs().sum() > 0
    assert spare[1:].abs().sum() == 0


def test_log_probabilities_are_those_without_static_shapes(reference: Any) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, n_logprobs=3)
    prompts = _prompts([5, 40, 17])
    found, expected = (_engine(reference, is_static)[0].generate(prompts, params) for is_static in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert [each.logprob for each in one.logprobs] == pytest.approx(
            [each.logprob for each in other.logprobs], abs=1e-4
        )


def test_steps_of_adapters_and_of_several_tokens_are_not_static(reference: Any) -> None:
    _, runner = _engine(reference, True)
    assert runner.decoder is not None

    def chunk(tokens: tuple[int, ...], adapter: str | None = None) -> Chunk:
        return Chunk(new_sequence(Request("x", (1,), adapter=adapter), frozenset()), 0, tokens)

    assert runner.decoder.takes([chunk((1,)), chunk((2,))])
    assert not runner.decoder.takes([chunk((1,)), chunk((2, 3))])
    assert not runner.decoder.takes([chunk((1,)), chunk((2,), "tuned")])
    assert not runner.decoder.takes([])
