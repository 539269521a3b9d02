"""GRPO's loss against its formula written out in float64 over whole logits, and its gradient by finite differences."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from tests.training.conftest import make_rollouts

from kajiya.config.schema import LossConfig
from kajiya.data.batch import NO_TARGET, RolloutBatch
from kajiya.errors import TrainingError
from kajiya.training.losses import load_loss

Make = Callable[..., torch.nn.Module]


def _log_probs(model: Any, batch: RolloutBatch) -> list[np.ndarray]:
    """Of each answer's tokens, each row alone and without what fills it up."""
    found = []
    for row in range(len(batch.advantages)):
        n = int((batch.rows.segments[row] == 0).sum())
        targets = batch.rows.targets[row, :n].numpy()
        with torch.no_grad():
            logits = model(input_ids=batch.rows.tokens[row : row + 1, :n], use_cache=False).logits[0].double().numpy()
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        wanted = np.flatnonzero(targets != NO_TARGET)
        found.append(log_p[wanted, targets[wanted]])
    return found


def _own(table: torch.Tensor, batch: RolloutBatch) -> list[np.ndarray]:
    return [table[row][batch.rows.targets[row] != NO_TARGET].double().numpy() for row in range(len(batch.advantages))]


_OPTIONS: dict[str, dict[str, Any]] = {
    "token": {"clip_low": 0.2, "clip_high": 0.28, "beta": 0.2},
    "sequence": {"clip_low": 0.1, "clip_high": 0.1},
    "constant": {"beta": 0.5, "max_tokens": 11},
}


@pytest.mark.parametrize("normalize", sorted(_OPTIONS))
def test_the_loss_is_its_formula(normalize: str, tiny_model: Make) -> None:
    model = tiny_model().eval()
    batch = make_rollouts(3, old=True, reference=True)
    assert batch.old is not None
    assert batch.reference is not None
    options = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0} | _OPTIONS[normalize]
    config = LossConfig("grpo", {"normalize": normalize, "chunk_tokens": 5, **_OPTIONS[normalize]})
    losses, clipped, kls = [], 0, 0.0
    now = _log_probs(model, batch)
    for each, old, reference, advantage in zip(
        now, _own(batch.old, batch), _own(batch.reference, batch), batch.advantages.tolist(), strict=True
    ):
        ratio = np.exp(each - old)
        inside = np.clip(ratio, 1 - options["clip_low"], 1 + options["clip_high"])
        kl = np.exp(reference - each) - (reference - each) - 1
        losses.append(-np.minimum(ratio * advantage, inside * advantage) + options["beta"] * kl)
        clipped += int((ratio * advantage > inside * advantage).sum())
        kls += float(kl.sum())
    n = sum(len(each) for each in losses)
    expected = {
        "token": sum(each.sum() for each in losses) / n,
        "sequence": np.mean([each.mean() for each in losses]),
        "constant": sum(each.sum() for each in losses) / (11 * len(losses)),
    }[normalize]
    terms, metrics = load_loss(config)(model, batch)
    ((total, unit),) = terms.values()
    assert float(total.detach()) / batch.counts[str(unit)] == pytest.approx(float(expected), rel=1e-4)
    figures = {name: float(value) / batch.counts[str(count)] for name, (value, count) in metrics.items()}
    assert clipped > 0
    assert figures["clipped"] == pytest.approx(clipped / n)
    assert ("kl" in figures) == bool(options["beta"])
    if options["beta"]:
        assert figures["kl"] == pytest.approx(kls / n, rel=1e-4)
    assert figures["entropy"] == pytest.approx(-np.concatenate(now).mean(), rel=1e-4)
    difference = np.concatenate(_own(batch.old, batch)) - np.concatenate(_own(batch.sampled, batch))
    assert figures["mismatch/ratio"] == pytest.approx(np.exp(difference).mean(), rel=1e-4)
    assert figures["mismatch/difference"] == pytest.approx(np.abs(difference).mean(), rel=1e-4)


def test_on_the_first_step_it_is_the_policy_gradient(tiny_model: Make) -> None:
    """Without old log-probabilities the ratio is 1: the value is −Σ A, the gradient that of −Σ A · log p."""
    model: Any = tiny_model().double()
    batch = make_rollouts(2)
    batch = replace(batch, advantages=batch.advantages.double())
    total, unit = load_loss(LossConfig("grpo"))(model, batch)[0]["loss"]
    lengths = (batch.rows.targets != NO_TARGET).sum(dim=1)
    assert float(total.detach()) == pytest.approx(-float((batch.advantages * lengths).sum()), rel=1e-6)
    assert unit == "targets"
    total.backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    from kajiya.training.losses.sequences import token_log_probs

    (-(token_log_probs(model, batch.rows, 64) * batch.advantages[:, None]).sum()).backward()
    for ours, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_the_gradient_by_finite_differences(tiny_model: Make) -> None:
    model: Any = tiny_model().double()
    model.set_attn_implementation("eager")
    batch = make_rollouts(3, old=True, reference=True)
    weight = model.get_input_embeddings().weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for normalize, options in sorted(_OPTIONS.items()):
        loss = load_loss(LossConfig("grpo", {"normalize": normalize, "chunk_tokens": 6, **options}))

        def value(loss: Any = loss) -> torch.Tensor:
            total: torch.Tensor = loss(model, batch)[0]["loss"][0]
            return total

        model.zero_grad()
        value().backward()
        slope = float((weight.grad * direction).sum())
        ends = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                ends.append(float(value()))
        with torch.no_grad():
            weight.add_(direction, alpha=1e-6)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-6), normalize


def test_what_the_answers_earned_is_told() -> None:
    from kajiya.training.losses.policy import reward_terms

    batch = make_rollouts(2, k=3)
    rewards = torch.tensor([[1.0, 1, 0], [0, 0, 0], [2, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 1]])
    batch = replace(batch, rewards=rewards, is_cut=torch.tensor([True, False, False, False, False, True]))
    figures = {name: float(total) / batch.counts[str(unit)] for name, (total, unit) in reward_terms(batch).items()}
    assert figures["reward"] == pytest.approx(1.0)
    assert figures["reward_std"] == pytest.approx(0.5)
    assert figures["rewards/one"] == pytest.approx(4 / 6)
    assert figures["rewards/two"] == pytest.approx(2 / 6)
    assert figures["alike"] == pytest.approx(0.5)
    assert figures["cut"] == pytest.approx(2 / 6)
    assert figures["length"] == pytest.approx(batch.n_targets / 6)


def test_a_divergence_without_a_reference_is_refused(tiny_model: Make) -> None:
    with pytest.raises(TrainingError, match="reference"):
        load_loss(LossConfig("grpo", {"beta": 0.1}))(tiny_model(), make_rollouts(1))
