"""The engine on a GPU, through Transformers over the paged cache."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kajiya.serving.sequence import SamplingParams

from .conftest import open_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(("precision", "epsilon"), [("fp32", 1e-3), ("bf16", 0.5)])
@pytest.mark.parametrize("settings", [{}, {"guesses": 4}, {"cache_tokens": 256}])
def test_every_token_is_near_the_best_of_the_reference(
    model_folder: Path, reference: Any, precision: str, epsilon: float, settings: dict[str, Any]
) -> None:
    """In a batch, in chunks, with guesses and after preemptions, whose products round otherwise than one text's."""
    engine = open_engine(model_folder, precision=precision, device="cuda", **settings)
    engine.scheduler.step_tokens = 48
    draw = random.Random(0)
    prompts = [[draw.randrange(1, 512) for _ in range(length)] for length in (1, 30, 7, 100, 64)]
    found = engine.generate(prompts, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = [*prompt, *answer.token_ids]
        with torch.no_grad():
            logits = reference(torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        drawn = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert (logits.amax(-1) - drawn).max().item() <= epsilon * logits.std().item()
    assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks


@pytest.mark.parametrize(("precision", "epsilon"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_replayed_step_is_the_step(model_folder: Path, precision: str, epsilon: float) -> None:
    """The same single tokens through CUDA graphs and without, over prompts that went in alike; padding is in it."""
    with_graphs, without = (
        open_engine(model_folder, precision=precision, device="cuda", max_batch=8) for _ in range(2)
    )
    decoder = with_graphs.runner.decoder  # type: ignore[attr-defined]
    without.runner.decoder = None  # type: ignore[attr-defined]
    draw = random.Random(1)
    prompts = [[draw.randrange(1, 512) for _ in range(length)] for length in (1, 30, 7, 100, 64)]
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    # A token at a time behind ever longer prompts, so that a near tie does not part the two.
    for _ in range(6):
        pairs = [engine.generate(prompts, params) for engine in (with_graphs, without)]
        for prompt, mine, other in zip(prompts, *pairs, strict=True):
            assert mine.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=epsilon)
            prompt.append(other.token_ids[0])
    assert decoder.problem is None
    assert decoder.n_graphs == len(decoder.shapes) > 1
