"""Multi-token prediction: each further token a term with a count of its own, helped by heads that are left out of what is saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import VOCABULARY, NoTokenizer, make_batch
from tests.training.test_fit import make_setup
from transformers import AutoModelForCausalLM

from kajiya.config.compose import compose
from kajiya.config.options import NextTokenLoss
from kajiya.config.schema import LossConfig, ModelConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import ConfigError
from kajiya.models.build import build_model
from kajiya.models.future import add_future_heads, future_heads, without_future_heads
from kajiya.models.hidden import last_hidden
from kajiya.models.save import save_model
from kajiya.training.checkpoint import load_checkpoint, save_checkpoint
from kajiya.training.fit import Setup, fit, train_step
from kajiya.training.losses import load_loss
from kajiya.training.losses.next_token import next_token
from kajiya.training.state import TrainState

N = 2


def _model() -> Any:
    module = build_model(ModelConfig(n_params="30k", max_positions=64), VOCABULARY, 0).module
    derived = add_future_heads(module, N)
    width = module.config.hidden_size
    assert derived == {"model.future_params": N * width * width}
    return module.train()


def _batch(seed: int, rows: int = 2) -> Batch:
    batch = make_batch(rows, seed=seed)
    weights = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(seed))
    return replace(batch, weights=weights if seed % 2 else None).with_future(N)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_further_token_is_the_plain_cross_entropy_of_its_head(seed: int) -> None:
    """Against a loop over every position, with and without weights."""
    model, batch = _model(), _batch(seed)
    with torch.no_grad():
        for parameter in future_heads(model).parameters():  # type: ignore[union-attr]
            parameter.normal_(std=0.3)
        terms, metrics = next_token(model, batch, NextTokenLoss(chunk_tokens=5, future_weight=0.5))
        hidden = last_hidden(model, batch)
        heads = future_heads(model)
        assert heads is not None
        for k, states in enumerate(heads(hidden), start=1):
            log_p = (states @ model.lm_head.weight.T).log_softmax(-1)
            total, count = 0.0, 0.0
            for row in range(len(batch.tokens)):
                for t in range(batch.tokens.shape[1] - k):
                    target = int(batch.targets[row, t + k])
                    if batch.segments[row, t] == batch.segments[row, t + k] and target != NO_TARGET:
                        weight = 1.0 if batch.weights is None else float(batch.weights[row, t + k])
                        total -= weight * float(log_p[row, t, target])
                        count += weight
            assert batch.counts[f"future_{k}"] == pytest.approx(count, rel=1e-5)
            assert float(metrics[f"nll_{k + 1}"][0]) == pytest.approx(total, rel=1e-4)
            assert float(terms[f"future_{k}"][0]) == pytest.approx(0.5 / N * total, rel=1e-4)
            assert terms[f"future_{k}"][1] == f"future_{k}"
        plain, _ = next_token(
            build_model(ModelConfig(n_params="30k", max_positions=64), VOCABULARY, 0).module, batch, NextTokenLoss()
        )
        torch.testing.assert_close(terms["loss"][0], plain["loss"][0])


def _setup(**more: Any) -> Setup:
    loss = load_loss(LossConfig(options={"chunk_tokens": 7}))
    return make_setup(_model(), [_batch(seed) for seed in (0, 2, 4)], **{"loss": loss, **more})


def test_every_term_is_divided_by_its_own_count_over_the_group() -> None:
    """The gradient of two micro-batches is that of the sums over both, each over its own count."""
    setup = _setup(accumulate=2, clip_norm=None)
    taken: list[torch.Tensor] = []
    setup.optimizer.step = lambda lr: taken.extend(each.clone() for each in setup.optimizer.grads())  # type: ignore[method-assign]
    train_step(setup, TrainState())

    model = _model()
    batches = [_batch(0), _batch(2)]
    objective = torch.zeros(())
    for name in ("loss", "future_1", "future_2"):
        sums = [next_token(model, batch, NextTokenLoss(chunk_tokens=7))[0][name] for batch in batches]
        counts = [batch.counts[str(unit)] for batch, (_, unit) in zip(batches, sums, strict=True)]
        objective = objective + sum(value for value, _ in sums) / sum(counts)
    objective.backward()
    for found, parameter in zip(taken, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_heads_learn_resume_bit_for_bit_and_are_left_out_of_what_is_saved(tmp_path: Path) -> None:
    whole = _setup(steps=8)
    fit(whole, TrainState(), [], lambda: False)
    heads = future_heads(whole.model)
    assert heads is not None
    assert all(bool(block.weight.any()) for block in heads.blocks)

    part, state = _setup(steps=8), TrainState()
    fit(part, state, [], lambda: state.step == 3)
    saved = save_checkpoint(tmp_path / "c", state, part.model, part.optimizer, part.loader.state(), "key")
    rest = _setup(steps=8)
    state, position = load_checkpoint(saved, rest.model, rest.optimizer, "key")
    rest.loader.load_state(position)
    fit(rest, state, [], lambda: False)
    for (name, expected), found in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(expected, found), name

    with without_future_heads(whole.model):
        save_model(whole.model, NoTokenizer(), tmp_path / "model")
    assert future_heads(whole.model) is heads
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    ids = _batch(0).tokens
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, whole.model.eval()(ids).logits)


def test_what_does_not_go_with_them_is_named() -> None:
    for settings, words in (
        (["adapter.name=lora"], "freezes"),
        (["train.row_growth=[0.5]"], "whole rows"),
        (["train.loss.name=distill"], "next_token"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose(
                "stdlib-pretrain", ["model.future_heads=2", "train.row_growth=[]", "train.loss.options={}", *settings]
            )
