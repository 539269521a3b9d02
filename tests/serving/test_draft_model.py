"""A smaller model that guesses: the answers are those without it, whatever it says, and nothing of it is left over."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.errors import ConfigError
from kajiya.serving.draft_model import DraftModel
from kajiya.serving.engine import Engine
from kajiya.serving.sequence import Request, SamplingParams

from .conftest import CONTEXT, is_greedy, open_engine

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def _prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 512) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory, reference: Any, tokenizer: Any) -> Path:
    """The model, slightly disturbed, with a shorter context and a padded table: right often, but not always."""
    folder = tmp_path_factory.mktemp("draft")
    config = reference.config.__class__(
        **reference.config.to_dict() | {"max_position_embeddings": CONTEXT - 32, "vocab_size": 520}
    )
    model = reference.__class__(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        mine = model.state_dict()
        for name, tensor in reference.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.01
            mine[name][: len(tensor)] = tensor + noise
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _answers(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [one.token_ids for one in engine.generate(prompts, params)]


def _pool(engine: Engine) -> Any:
    drafter = engine._drafter
    assert isinstance(drafter, DraftModel)
    assert drafter._shadows == {}
    return drafter.pool


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_a_draft_changes_no_greedy_answer(model_folder: Path, draft_folder: Path, reference: Any, runner: str) -> None:
    engine = open_engine(model_folder, runner=runner, draft=str(draft_folder), guesses=4)
    prompts = _prompts([1, 30, 7, 64, 120, 3, 150])
    for prompt, answer in zip(prompts, _answers(engine, prompts), strict=True):
        assert len(answer) == 40
        assert is_greedy(reference, prompt, answer)
    # Right often, and not always.
    assert 0.3 < engine.n_confirmed / engine.n_drafted < 1
    assert _pool(engine).n_free == _pool(engine).n_blocks


def test_a_perfect_draft_saves_steps(model_folder: Path, reference: Any) -> None:
    prompt = _prompts([20], seed=1)[0]
    engine = open_engine(model_folder, draft=str(model_folder), guesses=4)
    engine.add(Request("a", tuple(prompt), GREEDY))
    n_steps = 0
    answer = []
    while not engine.is_idle:
        n_steps += 1
        answer += [output.token.token for output in engine.step() if output.token]
    assert is_greedy(reference, prompt, answer)
    assert engine.n_confirmed == engine.n_drafted
    # One step reads the prompt and says a token; of the 39 others, each step says five.
    assert n_steps == 1 + 8


@pytest.mark.parametrize("settings", [{}, {"quantize": "int8"}, {"cache_precision": "int8"}])
def test_an_answer_is_the_same_to_the_bit_with_a_draft_in_any_company(
    model_folder: Path, draft_folder: Path, settings: dict[str, str]
) -> None:
    def logprobs(engine: Engine, params: SamplingParams) -> list[list[tuple[int, float]]]:
        found = engine.generate(prompts, params)
        return [[(one.token, one.logprob) for one in each.logprobs] for each in found]

    prompts = _prompts([1, 30, 7, 64, 100], seed=2)
    sampled = SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, seed=3, ignore_eos=True)
    for params in (GREEDY, sampled):
        expected = logprobs(open_engine(model_folder, **settings), params)
        drafting = open_engine(model_folder, draft=str(draft_folder), guesses=3, **settings)
        assert logprobs(drafting, params) == expected
        assert drafting.n_confirmed > 20
        tight = open_engine(model_folder, draft=str(draft_folder), guesses=3, cache_tokens=192, **settings)
        tight.scheduler.step_tokens = 7
        assert logprobs(tight, params) == expected
        assert tight.scheduler.n_preemptions > 0
        assert _pool(tight).n_free == _pool(tight).n_blocks


def test_long_prompts_are_read_by_the_draft_in_pieces(model_folder: Path, draft_folder: Path, reference: Any) -> None:
    engine = open_engine(model_folder, draft=str(draft_folder), guesses=2)
    drafter = engine._drafter
    assert isinstance(drafter, DraftModel)
    drafter._step_tokens = 11
    seen = []
    real = drafter.runner.run

    def run(plan: Any) -> Any:
        seen.append(sum(chunk.count for chunk in plan.chunks))
        return real(plan)

    drafter.runner.run = run  # type: ignore[method-assign]
    prompts = _prompts([100, 60, 5], seed=4)
    for prompt, answer in zip(prompts, _answers(engine, prompts), strict=True):
        assert is_greedy(reference, prompt, answer)
    assert max(seen) == 11
    assert engine.n_confirmed > 0


def test_cancelled_requests_failures_and_new_weights_leave_nothing(
    model_folder: Path, draft_folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(model_folder, draft=str(draft_folder), guesses=3)
    prompts = _prompts([20, 30, 40], seed=6)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), GREEDY))
    for _ in range(4):
        engine.step()
    engine.cancel("1")
    drafter = engine._drafter
    assert isinstance(drafter, DraftModel)
    assert drafter._shadows.keys() == {"0", "2"}
    with monkeypatch.context() as patch:
        patch.setattr(drafter.runner, "run", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.fail_all("out of luck")
    assert _pool(engine).n_free == _pool(engine).n_blocks
    engine.set_weights(reference.state_dict(), version=1)
    answers = _answers(engine, prompts)
    assert all(is_greedy(reference, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))


def test_a_draft_of_other_tokens_is_refused(model_folder: Path, draft_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.guesses=4"):
        open_engine(model_folder, draft=str(draft_folder))
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        open_engine(model_folder, draft=str(tmp_path), guesses=2)
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(draft_folder)
    other.add_tokens(["<one more>"])
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((draft_folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="1 differ"):
        open_engine(model_folder, draft=str(tmp_path), guesses=2)
