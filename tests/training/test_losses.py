"""Each loss against an independent truth: the paper's formula written out over whole logits, one unpacked sequence at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp, softmax
from tests.training.conftest import make_batch, make_examples, random_sequences

from kajiya.config.options import DistillLoss, NextTokenLoss
from kajiya.config.schema import AdapterConfig, LossConfig
from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch
from kajiya.models.adapt import transform
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.losses.distill import distill
from kajiya.training.losses.next_token import next_token
from kajiya.training.losses.preference import log1mexp
from kajiya.training.losses.sequences import reference_log_probs, sequence_log_probs

Make = Callable[..., torch.nn.Module]


def _mean(config: LossConfig, model: Any, batch: Any) -> float:
    """The loss over what it counts."""
    ((total, unit),) = load_loss(config)(model, batch)[0].values()
    return float(total.detach()) / batch.counts[unit]


def _sequence_figures(model: Any, batch: ExampleBatch) -> tuple[np.ndarray, np.ndarray]:
    """Σ log p of the targets and their number, one sequence at a time, alone in its row, from whole logits."""
    sums, lengths = [], []
    for sequence in range(len(batch.last)):
        mine = batch.owner == sequence
        tokens, targets = batch.rows.tokens[mine][None], batch.rows.targets[mine]
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0].double().numpy()
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        wanted = (targets != NO_TARGET).numpy()
        sums.append(log_p[wanted, targets.numpy()[wanted]].sum())
        lengths.append(wanted.sum())
    return np.array(sums), np.array(lengths)


@pytest.fixture
def pairs(tiny_model: Make) -> tuple[Any, ExampleBatch, np.ndarray, np.ndarray, np.ndarray]:
    """Model, five packed pairs with a reference, and of each sequence: log-probability, its reference, length."""
    model = tiny_model().eval()
    batch = make_examples(random_sequences(10), k=2)
    sums, lengths = _sequence_figures(model, batch)
    reference = sums + np.random.default_rng(0).normal(0, 3, len(sums))
    return model, replace(batch, reference=torch.tensor(reference).float()), sums, reference, lengths


def test_packed_sequences_have_the_log_probability_that_each_has_alone(pairs: Any) -> None:
    model, batch, sums, _, lengths = pairs
    got, counts = sequence_log_probs(model, batch, 5)
    np.testing.assert_allclose(got.detach().numpy(), sums, rtol=1e-5)
    np.testing.assert_array_equal(counts.numpy(), lengths)


def _log_sigmoid(values: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -values)


_DPO: dict[str, Callable[..., np.ndarray]] = {
    "sigmoid": lambda z, _n: -0.9 * np.log(expit(0.3 * z)) - 0.1 * np.log(1 - expit(0.3 * z)),
    "sigmoid_norm": lambda _z, n: -0.9 * np.log(expit(0.3 * n)) - 0.1 * np.log(1 - expit(0.3 * n)),
    "robust": lambda z, _n: (-0.9 * np.log(expit(0.3 * z)) + 0.1 * np.log(1 - expit(0.3 * z))) / 0.8,
    "hinge": lambda z, _n: np.maximum(0, 1 - 0.3 * z),
    "ipo": lambda _z, n: (n - 1 / 0.6) ** 2,
}


@pytest.mark.parametrize("kind", sorted(_DPO))
def test_dpo(kind: str, pairs: Any) -> None:
    model, batch, sums, reference, lengths = pairs
    ratios = sums - reference
    z, n = (ratios[0::2] - ratios[1::2]), (ratios / lengths)[0::2] - (ratios / lengths)[1::2]
    config = LossConfig("dpo", {"kind": kind, "beta": 0.3, "label_smoothing": 0.1, "chunk_tokens": 5})
    assert _mean(config, model, batch) == pytest.approx(_DPO[kind](z, n).mean(), rel=1e-4)
    _, metrics = load_loss(config)(model, batch)
    figures = {name: float(total) / batch.counts[str(unit)] for name, (total, unit) in metrics.items()}
    assert figures["rewards/margins"] == pytest.approx(0.3 * z.mean(), rel=1e-4)
    assert figures["rewards/accuracies"] == pytest.approx((z > 0).mean())
    assert figures["rewards/chosen"] == pytest.approx(0.3 * ratios[0::2].mean(), rel=1e-4)
    assert figures["logps/rejected"] == pytest.approx(sums[1::2].mean(), rel=1e-4)


def test_dpo_begins_at_log_2(pairs: Any) -> None:
    model, batch, sums, _, _ = pairs
    same = replace(batch, reference=torch.tensor(sums).float())
    assert _mean(LossConfig("dpo"), model, same) == pytest.approx(math.log(2), rel=1e-5)


def test_orpo(pairs: Any) -> None:
    model, batch, sums, _, lengths = pairs
    p = np.exp(sums / lengths)
    odds = p / (1 - p)
    expected = -np.log(p[0::2]) - 0.4 * _log_sigmoid(np.log(odds[0::2] / odds[1::2]))
    assert _mean(LossConfig("orpo", {"beta": 0.4}), model, batch) == pytest.approx(expected.mean(), rel=1e-4)


def test_simpo(pairs: Any) -> None:
    model, batch, sums, _, lengths = pairs
    mean = sums / lengths
    expected = -_log_sigmoid(2.5 * (mean[0::2] - mean[1::2]) - 0.7)
    config = LossConfig("simpo", {"beta": 2.5, "gamma": 0.7})
    assert _mean(config, model, batch) == pytest.approx(expected.mean(), rel=1e-4)


def test_log1mexp_keeps_its_digits_and_its_gradient() -> None:
    values = torch.tensor([-1e-6, -0.1, -0.7, -3.0, -60.0, 0.0], requires_grad=True)
    result = log1mexp(values)
    expected = np.log(-np.expm1(values.detach().double().numpy()[:5]))
    np.testing.assert_allclose(result.detach().numpy()[:5], expected, rtol=1e-5, atol=1e-20)
    result[:5].sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_reference_whose_matrices_begin_elsewhere_is_not_taken_for_the_model_under_autocast(
    init: str, tiny_model: Make
) -> None:
    """Autocast keeps its casts of weights, of a pass without gradient too: the reference's and the model's are two."""
    model: Any = tiny_model()
    transform(model, AdapterConfig("lora", {"init": init, "r": 4}), "none", seed=0)
    batch = make_examples(random_sequences(10), k=2)
    with torch.no_grad():
        initial = sequence_log_probs(model.eval(), batch, 64)[0]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(4.0)
        trained = sequence_log_probs(model, batch, 64)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = sequence_log_probs(model, batch, 64)[0]
        reference = reference_log_probs(model, batch, 64)
        again = sequence_log_probs(model, batch, 64)[0]
    assert (trained - initial).abs().max() > 0.3
    torch.testing.assert_close(own, again)
    torch.testing.assert_close(own, trained, atol=0.1, rtol=0.01)
    torch.testing.assert_close(reference, initial, atol=0.1, rtol=0.01)
    again.sum().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_kto_measures_its_reference_point_over_the_whole_group(tiny_model: Make) -> None:
    model = tiny_model().eval()
    config = LossConfig("kto", {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5})
    group, ratios, mismatched = [], [], []
    for seed, n in ((1, 3), (2, 5)):
        batch, other = make_examples(random_sequences(n, seed), k=1), make_examples(random_sequences(n, seed + 10), k=1)
        (sums, _), (other_sums, _) = _sequence_figures(model, batch), _sequence_figures(model, other)
        generator = np.random.default_rng(seed)
        shift, other_shift = generator.normal(0, 2, n), generator.normal(0.5, 0.3, n)
        other = replace(other, reference=torch.tensor(other_sums - other_shift).float())
        labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0][:n])
        reference = torch.tensor(sums - shift).float()
        group.append(replace(batch, reference=reference, labels=labels, mismatched=other))
        ratios.append(shift)
        mismatched.append(other_shift)
    measure = load_measure(config)
    assert measure is not None
    measured = [measure(model, batch)["kl"] for batch in group]
    kl = sum(float(total) for total, _ in measured) / 8
    point = float(np.concatenate(mismatched).mean())
    assert point > 0.1
    assert kl == pytest.approx(point, rel=1e-3)
    for batch, ratio in zip(group, ratios, strict=True):
        assert batch.labels is not None
        good = batch.labels.numpy() > 0
        losses = np.where(good, 1.5 * (1 - expit(0.2 * (ratio - point))), 0.5 * (1 - expit(0.2 * (point - ratio))))
        assert _mean(config, model, replace(batch, measured={"kl": kl})) == pytest.approx(losses.mean(), rel=1e-4)
    below = _mean(config, model, replace(group[0], measured={"kl": -3.0}))
    assert below == pytest.approx(_mean(config, model, replace(group[0], measured={"kl": 0.0})))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_distillation(divergence: str, tiny_model: Make) -> None:
    student, teacher, batch = tiny_model().eval(), tiny_model(1, hidden_size=16).eval(), make_batch(3)
    options = DistillLoss(
        "x", divergence=divergence, temperature=2.0, teacher_weight=0.7, jsd_teacher_share=0.3, chunk_tokens=5
    )
    ((total, unit),) = distill(student, batch, options, teacher)[0].values()
    p, q = (_probabilities(model, batch, 2.0) for model in (teacher, student))
    m = 0.3 * p + 0.7 * q
    kl = lambda a, b: (a * np.log(a / b)).sum(axis=1)  # noqa: E731
    expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m)}[divergence].sum()
    targets = batch.targets[batch.targets != NO_TARGET].numpy()
    nll = -np.log(_probabilities(student, batch, 1.0)[np.arange(len(targets)), targets]).sum()
    assert float(total.detach()) == pytest.approx(0.7 * 4 * expected + 0.3 * nll, rel=1e-4)
    assert unit == "targets"
    total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters() if not parameter.requires_grad)


def _probabilities(model: Any, batch: Batch, temperature: float) -> np.ndarray:
    from kajiya.models.hidden import all_logits

    with torch.no_grad():
        logits = all_logits(model, batch)[batch.targets != NO_TARGET].double().numpy()
    result: np.ndarray = softmax(logits / temperature, axis=1)
    return result


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model: Make) -> None:
    model, batch = tiny_model().eval(), make_batch(2)
    terms, _ = distill(model, batch, DistillLoss("x"), tiny_model().eval())
    assert float(terms["loss"][0].detach()) == pytest.approx(0.0, abs=1e-4)


def test_targets_with_weights(tiny_model: Make) -> None:
    """The term is Σ w · −log p over Σ w, with smoothing as in torch; a module without a split head comes to the same."""
    model = tiny_model().eval()
    batch = make_batch(3)
    batch = replace(batch, weights=torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0)))
    options = NextTokenLoss(label_smoothing=0.2, z_loss=0.01, chunk_tokens=7)
    terms, metrics = next_token(model, batch, options)
    assert terms["loss"][1] == metrics["nll"][1] == "loss"
    from kajiya.models.hidden import all_logits

    logits, targets, weights = all_logits(model, batch).flatten(0, 1), batch.targets.flatten(), batch.weights
    assert weights is not None
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    each = each + 0.01 * logits.logsumexp(1).square() * (targets != NO_TARGET)
    torch.testing.assert_close(terms["loss"][0], (each * weights.flatten()).sum(), rtol=1e-4, atol=1e-4)

    class Plain(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return all_logits(model, batch)

    torch.testing.assert_close(
        next_token(Plain(), batch, options)[0]["loss"][0], terms["loss"][0], rtol=1e-4, atol=1e-4
    )


def test_noise_is_bounded_by_its_formula_and_only_in_training(tiny_model: Make) -> None:
    model = tiny_model()
    batch = make_batch(2)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    for alpha, training in ((None, True), (5.0, True), (5.0, False)):
        model.train(training)
        next_token(model, batch, NextTokenLoss(neftune_alpha=alpha))
    assert torch.equal(seen[0], seen[2])
    noise = (seen[1] - seen[0]).abs().amax(dim=2)
    for row in range(2):
        for segment in (0, 1):
            mine = batch.segments[row] == segment
            bound = 5.0 / math.sqrt(int(mine.sum()) * 32)
            assert 0.7 * bound < float(noise[row][mine].max()) <= bound * 1.001


def test_gradients_of_every_sequence_loss_by_finite_differences(pairs: Any, tiny_model: Make) -> None:
    """Along a random direction of the embedding, in double precision."""
    _, batch, _, _, _ = pairs
    model: Any = tiny_model().double()
    model.set_attn_implementation("eager")
    labels = torch.tensor([1.0, 0.0] * 5)
    single = make_examples(random_sequences(10), k=1)
    single = replace(single, labels=labels, reference=batch.reference, measured={"kl": 0.3})
    cases: list[tuple[str, dict[str, Any], Any]] = [("dpo", {"kind": kind}, batch) for kind in sorted(_DPO)]
    cases += [("orpo", {}, batch), ("simpo", {}, batch), ("kto", {}, single)]
    weight = model.get_input_embeddings().weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, options, given in cases:
        loss = load_loss(LossConfig(name, {**options, "chunk_tokens": 6}))

        def value(loss: Any = loss, given: Any = given) -> torch.Tensor:
            total: torch.Tensor = loss(model, given)[0]["loss"][0]
            return total

        model.zero_grad()
        value().backward()
        slope = float((weight.grad * direction).sum())
        ends = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                ends.append(float(value()))
        with torch.no_grad():
            weight.add_(direction, alpha=1e-5)
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6), name
